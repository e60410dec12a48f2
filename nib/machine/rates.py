"""How many floating-point operations a device does per second: by its data sheet, or measured."""

import functools
import math
import re
import time

import torch

from nib.machine.device import synchronize

# Rates of dense 16-bit matrix products, added up in float32, in FLOP/s, from the vendors' data
# sheets. A name matches if it contains all words of the key; the first key counts. GeForce cards
# add up in float32 at half of the advertised rate; those of the RTX 50 series are 1/16 of the
# advertised FP4 rate, which is sparse. Apple publishes no rates.
PEAK_FLOPS = {
    'GB200': 2500e12,  # one of its two GPUs
    'B200': 2250e12,
    'GH200': 989e12,
    'H200': 989e12,
    'H100 PCIe': 756e12,
    'H100': 989e12,
    'A100': 312e12,
    'A10G': 70e12,
    'A40': 149.7e12,
    'RTX A6000': 154.8e12,
    'RTX 6000 Ada': 364.25e12,
    'L40S': 362e12,
    'L40': 181.05e12,
    'L4': 121e12,
    'V100': 125e12,
    'T4': 65e12,
    'RTX 5090': 209.5e12,
    'RTX 5080': 112.6e12,
    'RTX 5070 Ti': 87.9e12,
    'RTX 5070': 61.7e12,
    'RTX 4090': 165e12,
    'RTX 4080': 97.5e12,
    'RTX 3090': 71e12,
    'MI300A': 980.6e12,
    'MI300X': 1307.4e12,
    'MI325X': 1307.4e12,
}
NO_BFLOAT16 = ('V100', 'T4')
# Words of variants that have another rate than the device without them.
VARIANTS = {'NVL', 'Ti', 'SUPER', 'Laptop', 'Mobile', 'D', 'Max', 'Q', 'MIG'}
MEASURED_FOR = 0.1  # seconds that measure_flops takes


def peak_flops(device: str, dtype: str) -> float | None:
    """Returns the device's dense matrix rate in FLOP/s, or None if it is not in the table."""
    if not device.startswith('cuda'):
        return None
    return look_up_peak(torch.cuda.get_device_name(device), dtype)


def look_up_peak(name: str, dtype: str) -> float | None:
    """Returns the rate of the device with this name, or None if it is not in the table."""
    words = set(re.split(r'[\s-]+', name))
    for key, rate in PEAK_FLOPS.items():
        key_words = set(key.split())
        if words >= key_words and words & VARIANTS == key_words & VARIANTS:
            has_dtype = dtype == 'float16' or dtype == 'bfloat16' and key not in NO_BFLOAT16
            return rate if has_dtype else None
    return None


@functools.cache
def measure_flops(device: str, dtype: str) -> float:
    """Measures the device's matrix rate in FLOP/s: the best of the products of 0.1 seconds.

    The matrices grow until a product takes a few milliseconds. Measured once per process.
    """
    n, rate, ends = 256, 0.0, math.inf
    while time.perf_counter() < ends:
        matrix = torch.linspace(-1, 1, n * n, device=device).view(n, n).to(getattr(torch, dtype))
        fastest = math.inf
        for _ in range(3):
            synchronize(device)
            started = time.perf_counter()
            matrix @ matrix
            synchronize(device)
            fastest = min(fastest, time.perf_counter() - started)
        rate = max(rate, 2 * n**3 / fastest)
        ends = min(ends, time.perf_counter() + MEASURED_FOR)  # the first products load the library
        if fastest < 0.005 and n < 8192:
            n *= 2
    return rate
