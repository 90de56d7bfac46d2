"""Label Studio's brush format: a run-length code of RGBA pixels, packed into bits.

The rule is that of @thi.ng/rle-pack, which Label Studio's editor uses: 32 bits number of words, 5 bits word size
minus 1, four times 4 bits a length size minus 1; then blocks of 1 bit (run or literal words), 2 bits (which length
size), length minus 1, and the word or words.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from cliper.pipeline.export.runlength import label_counts

LENGTH_BITS = np.array([3, 4, 8, 16])
WORD_BITS = 8
_LONGEST = 1 << 16
_CHANNELS = 4


def encode_brush(mask: np.ndarray) -> list[int]:
    """The `rle` of a result, bytes 0 to 255, of a bool [H, W] mask."""
    whole = np.array([mask.size])
    return encode_counts(label_counts(mask.ravel()).get(1, whole))


def encode_counts(counts: np.ndarray) -> list[int]:
    """Encode from the numbers of pixels outside, inside, outside, ... in row order (see label_counts)."""
    values = np.arange(len(counts)) % 2
    lengths = counts * _CHANNELS  # a pixel is four equal words
    if not counts[0]:
        values, lengths = values[1:], lengths[1:]
    pieces = -(-lengths // _LONGEST)
    owner = np.repeat(np.arange(len(lengths)), pieces)
    piece = np.full(len(owner), _LONGEST)
    piece[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * _LONGEST
    size = np.searchsorted([8, 16, 256], piece)
    bits = LENGTH_BITS[size]
    words = np.where(values[owner], 255, 0)
    codes = ((((4 | size) << bits) | (piece - 1)) << WORD_BITS) | words
    header = (int(lengths.sum()) << 5 | WORD_BITS - 1) << 16 | _length_sizes()
    head = np.unpackbits(np.frombuffer((header << 11).to_bytes(8, "big"), np.uint8))[:53]
    stream = np.concatenate([head, _left_bits(codes, bits + 3 + WORD_BITS)])
    packed: list[int] = np.packbits(stream).tolist()
    return packed


def _length_sizes() -> int:
    return int("".join(f"{bits - 1:04b}" for bits in LENGTH_BITS), 2)


def _left_bits(codes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenate the lowest `counts` bits (at most 32) of every code."""
    aligned = (codes.astype(np.uint64) << (32 - counts).astype(np.uint64)).astype(">u4")
    bits = np.unpackbits(aligned.view(np.uint8)).reshape(-1, 32)
    return bits[np.arange(32) < counts[:, None]]


def decode_brush(rle: Sequence[int], height: int, width: int) -> np.ndarray:
    """Decode a result's `rle` to a mask, bool [height, width]: True if alpha is at least 128.

    Reads the output of every Label Studio version, including literal words. Raises ValueError if the code is
    damaged or has another size.
    """
    reader = _Bits(bytes(rle))
    count = reader.take(32)
    if count != height * width * _CHANNELS:
        raise ValueError(f"the brush holds {count} words, a mask of {width} x {height} has {height * width * 4}")
    word = reader.take(5) + 1
    sizes = [reader.take(4) + 1 for _ in range(4)]
    flat = np.concatenate(list(_blocks(reader, count, word, sizes)) or [np.zeros(0, np.uint8)])
    return flat.reshape(height, width, _CHANNELS)[..., 3] >= 128


def _blocks(reader: "_Bits", count: int, word: int, sizes: Sequence[int]) -> Iterator[np.ndarray]:
    if word != WORD_BITS:
        raise ValueError(f"the brush has words of {word} bits; Label Studio writes {WORD_BITS}")
    while count > 0:
        is_run = reader.take(1)
        length = reader.take(sizes[reader.take(2)]) + 1
        if length > count:
            raise ValueError("the brush's runs are longer than its mask")
        count -= length
        yield np.full(length, reader.take(8), np.uint8) if is_run else reader.take_bytes(length)


class _Bits:
    """A bit reader over a byte string."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, count: int) -> int:
        """The next `count` (at most 32) bits as a number."""
        end = self.place + count
        if end > len(self.data) * 8:
            raise ValueError("the brush ends too early")
        window = self.data[self.place >> 3 : (end + 7) >> 3]
        number = int.from_bytes(window, "big") >> (-end % 8)
        self.place = end
        return number & ((1 << count) - 1)

    def take_bytes(self, count: int) -> np.ndarray:
        """The next `count` bytes, uint8 [count]; they may start inside a byte."""
        end = self.place + 8 * count
        if end > len(self.data) * 8:
            raise ValueError("the brush ends too early")
        window = np.frombuffer(self.data, np.uint8)[self.place >> 3 : (end + 7) >> 3]
        bits = np.unpackbits(window)[self.place & 7 :][: 8 * count]
        self.place = end
        return np.packbits(bits)
