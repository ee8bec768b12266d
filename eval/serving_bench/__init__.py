"""Scripts for one Hopper machine with stock SGLang: start a server, compare kernels, measure, soak. See README.md here."""
