"""What kernels found wrong in data that the host does not read while a step runs."""

from fastidc.ops import _attention_triton, _info_nce_faults


def raise_faults() -> None:
    """ValueError, in sentences, where a call on a GPU since the last time this was asked met packed offsets that make no sense or a
    contrastive embedding that is not finite. Waits for the device."""
    sentences = _info_nce_faults.take_faults()
    if _attention_triton.take_faults():
        sentences.append(
            "packed attention met cu_seqlens that do not ascend from 0 to the number of rows in steps of at most max_seqlen; its results are "
            "void: make the offsets from the sequences' lengths with fastidc.packed."
        )
    if sentences:
        raise ValueError(" ".join(sentences))
