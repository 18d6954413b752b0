"""Write quant.npz with what bitsandbytes gives for `quant_cases.KEPT_CASES`.

Run it where bitsandbytes is installed: `python tests/references/quant_make.py`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes would compile its Python fallback for every shape anew
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import quant_cases


def main() -> None:
    """Write the file."""
    import bitsandbytes.functional as bnb
    import torch

    kept = {}
    for case in quant_cases.KEPT_CASES:
        kind, shape, dtype, quant_type, blocksize = case
        w = torch.from_numpy(quant_cases.weights(kind, shape, dtype))
        if quant_type == "dynamic":
            codes, state = bnb.quantize_blockwise(w, blocksize=blocksize)
            parts = {"codes": codes, "absmax": state.absmax, "values": bnb.dequantize_blockwise(codes, state)}
        else:
            codes, state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type)
            state.shape = torch.Size([w.numel()])  # for its kernel, which mistakes blocks longer than a row
            parts = {"codes": codes, "absmax": state.absmax, "values": bnb.dequantize_4bit(codes, state)}
            codes, double = bnb.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type, compress_statistics=True)
            double.shape = state.shape
            parts |= {"double absmax": double.absmax, "offset": double.offset, "nested absmax": double.state2.absmax}
            parts["double values"] = bnb.dequantize_4bit(codes, double)
        kept |= {f"{quant_cases.name(case)}: {part}": value.numpy() for part, value in parts.items()}
    np.savez_compressed(quant_cases.KEPT, **kept)


if __name__ == "__main__":
    main()
