"""BatchNorm + residual add + ReLU + gate on a CPU (csrc/batch_norm_bindings.cpp)."""

def statistics(
    shape: tuple[int, int, int], bfloat16: bool, x: tuple[int, int], mean: int, var: int, threads: int = 1
) -> None: ...
def normalize(
    shape: tuple[int, int, int],
    bfloat16: bool,
    x: tuple[int, int],
    mean: int,
    var: int,
    weight: int,
    bias: int,
    eps: float,
    residual: tuple[int, int],
    gates: tuple[int, int],
    relu: bool,
    y: tuple[int, int],
    threads: int = 1,
) -> None: ...
def backward(
    shape: tuple[int, int, int],
    bfloat16: bool,
    dy: tuple[int, int],
    x: tuple[int, int],
    mean: int,
    var: int,
    weight: int,
    bias: int,
    eps: float,
    residual: tuple[int, int],
    gates: tuple[int, int],
    relu: bool,
    training: bool,
    dx: tuple[int, int],
    dresidual: tuple[int, int],
    dweight: int,
    dbias: int,
    dgates: int,
    threads: int = 1,
) -> None: ...
