#!/usr/bin/env python3
"""Prints golden_tensors.txt: what PyTorch and safetensors read from the golden checkpoints.

    golden_tensors.py FOLDER > golden_tensors.txt       (needs torch, safetensors, xxhash)

One line a tensor: case, name, dtype, shape, XXH3-128 of its elements in row-major order.
"""
import glob
import os
import sys

import torch
import xxhash
from safetensors import safe_open

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

for case in sorted(glob.glob(os.path.join(sys.argv[1], "a*"))):
    tensors = {}
    for path in sorted(glob.glob(os.path.join(case, "model*.safetensors"))):
        with safe_open(path, "pt") as file:
            tensors.update((name, file.get_tensor(name)) for name in file.keys())
    for path in sorted(glob.glob(os.path.join(case, "*.bin"))):
        tensors.update(torch.load(path, weights_only=True))
    for name, tensor in sorted(tensors.items()):
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        shape = "x".join(str(n) for n in tensor.shape)
        print(os.path.basename(case), name, NAMES[tensor.dtype], shape, xxhash.xxh3_128_hexdigest(data))
