"""MP3 and AAC streams, frame by frame: each frame's header tells where the next one starts.

An MP3 has no header of its own. Some programs put a silent frame in front that says how many follow (Xing's);
a stream without one ends where it ends. Sources: ISO 11172-3 and 13818-3 (MP3), ISO 13818-7 (ADTS), id3.org.
Standard library only.
"""

import struct
from typing import BinaryIO

from omni_model.audio.unusable import Unusable, damaged, truncated

MP3_KBPS = {
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MP3_RATES_HZ = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
WINDOW_BYTES = 1 << 16


def read_at(file: BinaryIO, position: int, count: int) -> bytes:
    """Up to `count` bytes from `position` on."""
    file.seek(position)
    return file.read(count)


def after_id3(file: BinaryIO, position: int) -> int:
    """Where an ID3v2 tag at `position` ends, or `position`. Its length is four bytes of seven bits."""
    head = read_at(file, position, 10)
    if len(head) < 10 or head[:3] != b"ID3" or any(byte > 127 for byte in head[6:]):
        return position
    length = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return position + 10 + length + (10 if head[5] & 0x10 else 0)


def _after_padding(file: BinaryIO, position: int) -> int:
    """Where a tag (ID3v1, ID3v2, APEv2) or a row of zeros at `position` ends, or `position`."""
    window = read_at(file, position, WINDOW_BYTES)
    if window.startswith(b"TAG"):
        return position + 128
    if window.startswith(b"APETAGEX") and len(window) >= 32:
        return position + 32 + int.from_bytes(window[12:16], "little")
    if not any(window):
        return position + len(window)
    return after_id3(file, position)


def _mp3_frame(head: bytes) -> tuple[int, int, int] | None:
    """Length in bytes, samples and offset of a Xing mark of the layer 3 frame that starts so, or None."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2 or head[1] >> 3 & 3 == 1:
        return None
    version, rate, kbps = head[1] >> 3 & 3, head[2] >> 2 & 3, head[2] >> 4
    if rate == 3 or kbps in (0, 15):
        return None
    is_mpeg1, is_mono = version == 3, head[3] >> 6 == 3
    samples = 1152 if is_mpeg1 else 576
    length = samples * 125 * MP3_KBPS[is_mpeg1][kbps] // MP3_RATES_HZ[version][rate] + (head[2] >> 1 & 1)
    side_bytes = (17 if is_mono else 32) if is_mpeg1 else (9 if is_mono else 17)
    return length, samples, 4 + side_bytes


def first_mp3_frame(file: BinaryIO, start: int) -> int | None:
    """Where the first frame is, behind tags and padding; None unless another frame or a tag follows it."""
    while (after := _after_padding(file, start)) > start:
        start = after
    if not (frame := _mp3_frame(read_at(file, start, 4))):
        return None
    behind = read_at(file, start + frame[0], 4)
    is_followed = len(behind) < 4 or _mp3_frame(behind) or behind[:3] in (b"TAG", b"ID3", b"APE")
    return start if is_followed else None


def walk_mp3(file: BinaryIO, size: int, first: int, name: str) -> bytes:
    """Step from frame to frame, and hold their number against the Xing header's, where there is one.

    libsndfile believes a Xing header, and where there is none guesses the length from the first frames: of a
    file with a variable bit rate it would give a fraction and say nothing.

    Returns:
        A Xing header that tells the truth, to be put in front of a stream that has none; else nothing.

    Raises:
        Unusable: cut off, damaged, or more sound than the header says.
    """
    claimed, first_head = _xing_claim(file, first), read_at(file, first, 4)
    position, count, is_cut = first, 0, False
    while position < size:
        head = read_at(file, position, 4)
        frame = _mp3_frame(head)
        if frame and _constant(head) == _constant(first_head):
            is_cut = position + frame[0] > size
            position, count = position + frame[0], count + (not is_cut)
        elif (after := _after_padding(file, position)) > position:
            position = after
        else:
            raise damaged(name, position)
    if claimed is None:
        if is_cut:
            raise truncated(name, count, count + 1, "frames")
        return _xing_frame(first_head, count)
    frames = count - 1  # the Xing frame itself holds no sound, though some programs count it
    if frames < claimed - 1 or (is_cut and frames < claimed):
        raise truncated(name, frames, claimed, "frames")
    if frames > claimed:
        raise Unusable(
            f"{name} holds {frames} frames where its header says {claimed}; export it again.", "lying header"
        )
    return b""


def _constant(head: bytes) -> tuple[int, int]:
    """What all frames of a stream share: version and layer, and the sample rate."""
    return head[1] & 0x1E, head[2] & 0x0C


def _xing_claim(file: BinaryIO, first: int) -> int | None:
    """How many frames follow the Xing (or Info) frame at `first`, by its own account."""
    frame = _mp3_frame(head := read_at(file, first, 200))
    # Decoders take it for sound, not for a header, if anything but zeros stands before the mark.
    if frame is None or head[frame[2] :][:4] not in (b"Xing", b"Info") or any(head[4 : frame[2]]):
        return None
    told = head[frame[2] + 4 :][:8]
    if len(told) < 8:  # cut off inside its first frame: what follows finds nothing to play
        return None
    flags, count = struct.unpack(">II", told)
    return int(count) if flags & 1 else None


def _xing_frame(head: bytes, count: int) -> bytes:
    """A silent frame like the one that starts with `head`, which says that `count` frames follow it."""
    head = bytes([head[0], head[1] | 1, 9 << 4 | head[2] & 0x0C, head[3]])  # no checksum, a middling rate
    frame = _mp3_frame(head)
    assert frame is not None
    length, _, mark = frame
    return (head + bytes(mark - 4) + b"Xing" + struct.pack(">II", 1, count)).ljust(length, b"\0")


def walk_adts(file: BinaryIO, size: int, start: int, name: str) -> None:
    """Step over the frames of an AAC stream, whose headers hold 13 bits of length.

    Raises:
        Unusable: cut off or damaged.
    """
    position, first_head = start, read_at(file, start, 3)
    while position < size:
        head = read_at(file, position, 7)
        length = int.from_bytes(head[3:6], "big") >> 5 & 0x1FFF
        if len(head) == 7 and head[:3] == first_head and length >= 7:
            position += length
        elif (after := _after_padding(file, position)) > position:
            position = after
        else:
            raise damaged(name, position)
    if position > size:
        raise truncated(name, size, position, "bytes")
