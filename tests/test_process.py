import platform
import subprocess
import sys

import pytest

FAULTS_OF_A_TRAINING = """
import resource
import torch
from wsl_d2.process import keep_freed_memory

def work():
    for _ in range(20):
        tensors = [torch.ones(4 << 20) for _ in range(4)]  # 16 MiB each
    return tensors

if {keep}:
    keep_freed_memory()
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_is_kept_is_not_cleared_again():
    def count_faults(keep: bool) -> int:
        command = [sys.executable, "-c", FAULTS_OF_A_TRAINING.format(keep=keep)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert count_faults(True) < count_faults(False) / 10
