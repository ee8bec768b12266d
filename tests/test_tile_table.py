"""The tile tables: what they promise the kernel, which GPU gets which, and the commands that print and rewrite them."""

import re
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from hopper_moe.kernels import device as devices
from hopper_moe.kernels import jit, measured
from hopper_moe.kernels.device import Device
from hopper_moe.kernels.tile_table import MAX_TILE, TILES, TileTable, forced_tile, keep, smallest_tiles, table_for, tables
from hopper_moe.launch.kernels_cli import main
from hopper_moe.quantization.errors import Refusal


def test_every_table_holds_every_rest():
    for table in (*tables().values(), *map(smallest_tiles, TILES), *map(forced_tile, TILES)):
        for rows in range(1, table.max_tile):
            tile = table.tail_tile[-(-rows // 8)]
            assert tile in TILES and rows <= tile <= table.max_tile, (table, rows)
        assert table.as_list() == [table.max_tile, table.pair_from, *table.tail_tile] and len(table.as_list()) == 19


@pytest.mark.parametrize(
    "max_tile, tail_tile",
    [
        (24, (8,) * 17),  # no such tile
        (128, (128,) * 16),  # one entry short
        (128, (8,) * 17),  # 16 rows do not fit 8
        (64, (128,) * 17),  # above max_tile
        (128, (128,) * 16 + (112,)),  # no such tile at the end
    ],
)
def test_a_table_that_would_lose_rows_is_refused(max_tile, tail_tile):
    with pytest.raises(ValueError):
        TileTable(max_tile, tail_tile)


@pytest.mark.parametrize("pair_from", [-1, 1 << 16])
def test_a_number_of_tasks_the_kernel_cannot_hold_is_refused(pair_from):
    with pytest.raises(ValueError, match=f"pair_from {pair_from} "):
        TileTable(8, (8,) * 17, pair_from)


def test_smallest_tiles_are_the_smallest():
    assert smallest_tiles().tail_tile == (8, 8, 16, 32, 32, *(64,) * 4, *(96,) * 4, *(128,) * 4)
    assert forced_tile(32).tail_tile == (32,) * (MAX_TILE // 8 + 1)


# Peak numbers as torch reports them: SMs, GB/s, MHz. A MIG slice has a share of the SMs and of the memory.
SERVED = [
    Device("NVIDIA H800", 132, 3352, 1755), Device("NVIDIA H800 PCIe", 114, 2039, 1755),
    Device("NVIDIA H100 80GB HBM3", 132, 3352, 1980), Device("NVIDIA H100 PCIe", 114, 2039, 1755),
    Device("NVIDIA H100 NVL", 132, 3938, 1785), Device("NVIDIA H100 96GB HBM3", 132, 3352, 1980),
    Device("NVIDIA H20", 78, 4023, 1980), Device("NVIDIA H20-3e", 78, 4916, 1980),
    Device("NVIDIA H20Z", 132, 4916, 1980), Device("NVIDIA GH200 480GB", 132, 4023, 1980),
    Device("NVIDIA GH200 144G HBM3e", 132, 4916, 1980), Device("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 16, 419, 1980),
    Device("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 60, 1676, 1980), Device("NVIDIA Graphics Device", 132, None, None),
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    """Three measured GPU types whose tables differ in `pair_from`: 1, 2, 3."""
    path = tmp_path / "measured.json"
    types = {
        "H200": ("NVIDIA H200", 132, 4916, 1980),
        "H100": ("NVIDIA H100 80GB HBM3", 132, 3352, 1980),
        "H20": ("NVIDIA H20", 78, 4023, 1980),
    }
    for number, (sku, numbers) in enumerate(types.items(), 1):
        measured.label_to_write(Device(*numbers), sku, path)
        keep(sku, TileTable(128, smallest_tiles().tail_tile, number), "made up", path)
    return path


@pytest.mark.parametrize("device", SERVED, ids=lambda device: device.name)
def test_every_sm90_gpu_has_a_table_and_is_not_refused(device):
    assert table_for(device) == tables()["H200"]
    assert device.refusals() == [] and measured.label(device) == device.name.removeprefix("NVIDIA ")


@pytest.mark.parametrize(
    "name, sku",
    {
        "NVIDIA H800": "H100",
        "NVIDIA H800 PCIe": "H100",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H20-3e": "H20",
        "NVIDIA H20Z": "H200",
        "NVIDIA GH200 144G HBM3e": "H200",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb": "H20",
    }.items(),
)
def test_the_nearest_measured_table_serves_and_the_log_says_which_and_why(name, sku, path, caplog):
    device = next(device for device in SERVED if device.name == name)
    with caplog.at_level("INFO", logger="hopper_moe"):
        assert table_for(device, path) == tables(path)[sku]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"token tiles of {sku}: ")
    if name == "NVIDIA H100 80GB HBM3":
        assert line.endswith("measured on NVIDIA H100 80GB HBM3")
    else:
        assert f"{device} was not measured" in line and "is the nearest of H100, H20, H200 by SMs, bandwidth and clock" in line


def test_the_numbers_decide_between_gpus_of_one_name(path):
    """A name that stands for any engineering sample, and a GPU of which MPS gives this process half."""
    measured.label_to_write(Device("NVIDIA Graphics Device", 132, 3352, 1980), "sample", path)
    assert measured.label(Device("NVIDIA Graphics Device", 78, 4023, 1980), path) == "Graphics Device"
    assert measured.pick(Device("NVIDIA H200", 66, 4916, 1980), {"H200", "H20"}, path).sku == "H20"


def test_a_measurement_is_kept_under_a_label_of_its_own(path):
    h800 = Device("NVIDIA H800", 132, 3352, 1755)
    with pytest.raises(Refusal, match="NVIDIA H800 .* has no label among .*: name what is measured with --sku LABEL"):
        measured.label_to_write(h800, None, path)
    with pytest.raises(Refusal, match="--sku H100 stands for NVIDIA H100 80GB HBM3 .*, but this GPU is NVIDIA H800"):
        measured.label_to_write(h800, "H100", path)
    assert measured.label_to_write(h800, "H800", path) == measured.label_to_write(h800, None, path) == "H800"
    with pytest.raises(Refusal, match="NVIDIA H800 is kept as H800 already"):
        measured.label_to_write(h800, "other", path)


def test_numbers_are_read_from_the_device():
    properties = SimpleNamespace(
        name="NVIDIA H200", multi_processor_count=132, memory_bus_width=6144, memory_clock_rate=3_201_000, clock_rate=1_980_000,
        shared_memory_per_block_optin=232448,
    )  # fmt: skip
    assert Device.of(properties) == Device("NVIDIA H200", 132, 4917, 1980, 232448)
    assert measured.label(Device.of(properties)) == "H200"
    silent = SimpleNamespace(name="GRID H100", multi_processor_count=132, memory_clock_rate=0, memory_bus_width=0)
    assert Device.of(silent) == Device("GRID H100", 132)


def test_the_bound_of_shared_memory_is_the_kernels_own():
    source = (jit.SOURCE_DIR / "shared_storage.cuh").read_text()
    assert int(re.search(r"sizeof\(SharedStorage\) <= (\d+) \* 1024", source)[1]) * 1024 == devices.MIN_SHARED_BYTES


def test_table_command_prints_every_sku():
    printed = CliRunner().invoke(main, ["table"], catch_exceptions=False).output
    for sku, table in tables().items():
        assert f"{sku}: {table}" in printed
    assert (
        str(smallest_tiles()) == "blocks of 128; last block 1-8 rows: 8, 9-16 rows: 16, 17-32 rows: 32, 33-64 rows: 64, "
        "65-96 rows: 96, 97-128 rows: 128; pairs from 12 L1 tasks per SM"
    )
