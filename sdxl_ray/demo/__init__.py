"""The photographs that come with the package, and the run over them that `sdxl-ray demo` shows."""
