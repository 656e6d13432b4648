"""`python -m experiments.launch.hot 0,1,2`: keeps these GPUs busy with matrix products until Ctrl-C."""

import sys

import torch


def main(indices: list[int]) -> None:
    """Multiplies on all of them at once, a round of ten products at a time."""
    matrices = [torch.randn(8192, 8192, device=f"cuda:{index}", dtype=torch.float16) for index in indices]
    print(f"Keeping GPU {','.join(map(str, indices))} busy; Ctrl-C ends it.", flush=True)
    try:
        while True:
            for _ in range(10):
                for matrix in matrices:
                    torch.mm(matrix, matrix)
            for index in indices:
                torch.cuda.synchronize(index)
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main([int(index) for index in sys.argv[1].split(",")])
