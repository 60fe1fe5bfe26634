def blob_bytes(
    isa: int, levels: int, level_dtype: int, has_offsets: int, n: int, k: int, group: int, planes: int, precisions: int
) -> int: ...
def blob_begin(
    blob: int,
    bytes: int,
    isa: int,
    levels: int,
    level_dtype: int,
    has_offsets: int,
    n: int,
    k: int,
    group: int,
    planes: int,
    precisions: int,
) -> int: ...
def blob_plane(blob: int, bytes: int, plane: int, words: int, threads: int) -> int: ...
def blob_levels(blob: int, bytes: int, precision: int, scales: int, offsets: int | None) -> int: ...
def blob_steps(blob: int, bytes: int, precision: int, scale_steps: int, offset_steps: int | None) -> int: ...
def matmul(
    blob: int,
    bytes: int,
    x: int,
    dtype: int,
    rows: int,
    k: int,
    stride: int,
    precision: int,
    row_precisions: int | None,
    y: int,
    fast: int,
    threads: int,
) -> int: ...
def dequantize(
    blob: int, bytes: int, precision: int, first: int, count: int, dtype: int, out: int, threads: int
) -> int: ...
def read_seconds(memory: int, bytes: int, threads: int) -> float: ...
def tile_rows(isa: int) -> int: ...
def isa_usable(isa: int) -> bool: ...
def isa_best() -> int: ...
def use_openmp(library: str) -> bool: ...
