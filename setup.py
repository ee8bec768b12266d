"""Only what pyproject.toml cannot say: a wheel with compiled kernels (`make wheel-cubins`) is one of this platform."""

from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

PREBUILT = Path(__file__).parent / "kernels" / "prebuilt"


class PlatformWheel(bdist_wheel):
    """Tag py3-none-<platform> if the package holds shared libraries (they do not depend on Python's ABI), else py3-none-any."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not any(PREBUILT.rglob("*.so"))

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"bdist_wheel": PlatformWheel})
