"""A kernel as mlx writes it, and the compiler and headers it is compiled with."""

import os
import shutil
from pathlib import Path

from mlx_retrieval.backend import cpu_kernels, mx


def without_kernels() -> str:
    """Return the PATH that this process had before `backend.prepare`."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if cpu_kernels.FOLDER not in folder)


INCLUDE = Path(mx.__file__).parent / "include"
COMPILER = shutil.which("g++", path=without_kernels())
KERNEL = """extern "C"  {
void f(int* shape, int64_t** strides, void** args) {
  float* A = (float*)args[0];
  const int64_t* A_strides = strides[1];
  float* B = (float*)args[1];
  for (int i0 = 0; i0 < shape[0]; ++i0) {
  for (int i1 = 0; i1 < shape[1]; ++i1) {
  float tmp_A = *A;
  float tmp_B = Exp()(tmp_A);
  *B++ = tmp_B;
  A += A_strides[1];
  }
  A += A_strides[0];
  A -= A_strides[1] * shape[1];
  }
}
}
"""
