"""What kernels found wrong in data that the host does not read while a step runs."""

from fastidc.ops import _attention_triton, _info_nce_faults, _linear_cross_entropy_triton, _patches_cuda


def take_faults() -> list[str]:
    """In sentences, what calls on this process since the last time this was asked met: packed offsets that make no sense, a contrastive
    embedding that is not finite, a caption's target that is no word, an index of no stored image. Waits for the device."""
    sentences = _info_nce_faults.take_faults() + _linear_cross_entropy_triton.take_faults() + _patches_cuda.take_faults()
    if _attention_triton.faults.take():
        sentences.append(
            "Packed attention met cu_seqlens that do not ascend from 0 to the number of rows in steps of at most max_seqlen; its results are "
            "void: make the offsets from the sequences' lengths with fastidc.packed."
        )
    return sentences


def raise_faults() -> None:
    """ValueError where `take_faults` has something to say."""
    if sentences := take_faults():
        raise ValueError(" ".join(sentences))
