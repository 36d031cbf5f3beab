"""Does an audio file hold what its header claims? A look at the container before anything is decoded.

Decoders are kind: of a download that broke off, of a header that lies, of two files glued together they
return what they find and say nothing. A clip cut short without a word teaches a model a wrong transcript, so
each container is walked first, from one length field to the next, to its last byte:

- WAV, AIFF: the data chunk must end inside the file, and no sound may lie behind it.
- FLAC: the header carries the number of samples and an MD5 of them; the decoder's result is held against it.
- Ogg: each page has a checksum and a number; the last one is marked as last.
- MP3: frames follow each other by their own lengths, and a Xing header may say how many there are.
- Matroska/WebM, MP4: elements and boxes end inside the file.

Sources: RIFF/WAVE (Microsoft), RFC 9639 (FLAC), RFC 3533 (Ogg), ISO 11172-3 (MP3), RFC 8794 (EBML), ISO
14496-12 (MP4). Standard library only; of a file, no more than 64 KiB are looked at at a time.
"""

import os
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from omni_model.audio.mpeg_frames import after_id3, first_mp3_frame, read_at, walk_adts, walk_mp3
from omni_model.audio.unusable import Unusable, damaged, lying, several_streams, truncated

UNSTATED = 0xFFFF_FFFF  # what a program writes that streams a WAV and cannot know its length
WINDOW_BYTES = 1 << 16
LEAST_LOSS_S = 0.1  # sound of this length behind a WAV's data is a loss, less is padding
ID3V1_BYTES = 128
OGG_LAST, OGG_FIRST = 4, 2
EBML_ENTERED = (0x18538067, 0x1F43B675)  # Segment, Cluster: the only elements whose size may be unknown


@dataclass(frozen=True)
class Container:
    """What a walk through a file found.

    Attributes:
        form: "wav", "aiff", "flac", "ogg", "mp3", "matroska", "mov" or "aac".
        pcm16: of a 16-bit WAV: rate in Hz, channels, offset of the samples, number of frames.
        unstated: a WAV whose header leaves its length open.
        md5: of a FLAC's samples; empty where the encoder left it out.
        num_bits: of a FLAC's sample.
        mp3_header: of an MP3 without a Xing frame: one that can be put in front of `mp3_start`, where its
            first frame is, for decoders that would guess.
    """

    form: str
    pcm16: tuple[int, int, int, int] | None = None
    unstated: bool = False
    md5: bytes = b""
    num_bits: int = 0
    mp3_start: int = 0
    mp3_header: bytes = b""


def examine(file: BinaryIO, name: str) -> Container:
    """Tell what a file is and whether it is whole. Leaves the file at any position.

    Raises:
        Unusable: empty, no known audio, cut off, damaged, several streams, or a header that lies.
    """
    size = file.seek(0, os.SEEK_END)
    if not size:
        raise Unusable(f"{name} is empty; give a WAV, FLAC, OGG or MP3 file.", "empty")
    start = after_id3(file, 0)
    head = read_at(file, start, 16)
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE" and not start:
        return _wav(file, size, name)
    if head[:4] == b"FORM" and head[8:11] == b"AIF" and not start:
        return _aiff(head, size, name)
    if head[:4] == b"fLaC":
        return _flac(file, start, name)
    if head[:4] == b"OggS":
        return _ogg(file, size, start, name)
    if head[:4] == b"\x1aE\xdf\xa3":
        return _matroska(file, size, name)
    if head[4:8] == b"ftyp":
        return _mov(file, size, name)
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        walk_adts(file, size, start, name)
        return Container("aac")
    if (first := first_mp3_frame(file, start)) is not None:
        header = walk_mp3(file, size, first, name)
        return Container("mp3", mp3_start=first, mp3_header=header)
    kind = "is a web page or other text" if head.lstrip()[:1] in (b"<", b"{") else "is no audio that we know"
    raise Unusable(
        f"{name} cannot be read as audio: it {kind}; give WAV, FLAC, OGG, MP3, WebM or MP4.", "not audio"
    )


# --- WAV, AIFF, FLAC -----------------------------------------------------------------------------


def _wav(file: BinaryIO, size: int, name: str) -> Container:
    """Walk the chunks to `data`, and look at what lies behind it.

    A data chunk that claims more than the file holds makes the file truncated, however much sound it has:
    nobody can tell a careless header from a download that broke off. One whose length is left open (all
    bits set, as programs write that stream) claims nothing and is taken as it is.
    """
    position, long_size, fmt = 12, 0, b""
    while True:
        head = read_at(file, position, 8)
        if len(head) < 8:
            raise Unusable(f"{name} is a WAV file without sound data; copy it again.", "truncated")
        kind, length = struct.unpack("<4sI", head)
        body = position + 8
        if kind == b"data":
            break
        if kind == b"fmt ":
            fmt = read_at(file, body, 16)
        if kind == b"ds64":
            long_size = int.from_bytes(read_at(file, body + 8, 8), "little")
        position = body + length + length % 2
    unstated = length == UNSTATED and not long_size
    if length == UNSTATED:
        length = long_size or size - body
    if body + length > size:
        raise truncated(name, size - body, length, "bytes of sound")
    if len(fmt) < 16:
        raise Unusable(f"{name} is a WAV file that does not say its format; export it again.", "not audio")
    tag, channels, rate_hz, byte_rate, block_bytes, num_bits = struct.unpack("<HHIIHH", fmt)
    if tag in (1, 3) and byte_rate != rate_hz * block_bytes % (1 << 32):
        raise Unusable(
            f"{name} claims {rate_hz} Hz and {byte_rate} bytes a second, which disagree; export it again.",
            "lying header",
        )
    behind = size - _last_chunk_end(file, body + length + length % 2, size)
    if behind >= LEAST_LOSS_S * max(byte_rate, 1) and behind > ID3V1_BYTES:
        raise lying(name, length, behind)
    is_pcm16 = (tag, num_bits) == (1, 16) and channels > 0 and block_bytes == 2 * channels
    layout = (rate_hz, channels, body, length // block_bytes) if is_pcm16 else None
    return Container("wav", pcm16=layout, unstated=unstated)


def _last_chunk_end(file: BinaryIO, position: int, size: int) -> int:
    """Where the row of well-formed chunks ends that starts at `position`."""
    while len(head := read_at(file, position, 8)) == 8:
        kind, length = struct.unpack("<4sI", head)
        is_name = kind.isascii() and kind.decode().isprintable()
        if not is_name or kind in (b"RIFF", b"RF64", b"data") or position + 8 + length > size:
            break
        position += 8 + length + length % 2
    return min(position, size)


def _aiff(head: bytes, size: int, name: str) -> Container:
    """All of an AIFF is one chunk; what is cut off, or lies behind it, shows in that chunk's length."""
    length = 8 + int.from_bytes(head[4:8], "big")
    if length > size:
        raise truncated(name, size, length, "bytes")
    if size - length > ID3V1_BYTES:
        raise lying(name, length, size - length)
    return Container("aiff")


def _flac(file: BinaryIO, start: int, name: str) -> Container:
    """STREAMINFO: its bits 100 to 104 hold the sample size less one, its last 16 bytes the MD5.

    A second file behind the first would never be decoded, so it is looked for by its first eight bytes.
    """
    head = read_at(file, start, 42)
    num_bits = (int.from_bytes(head[18:22], "big") >> 4 & 31) + 1 if len(head) == 42 else 0
    before = b""
    file.seek(start + 42)
    while window := file.read(WINDOW_BYTES):
        if head[:8] in before + window:
            raise several_streams(name)
        before = window[-7:]
    return Container("flac", md5=head[26:42] if any(head[26:42]) else b"", num_bits=num_bits)


# --- Ogg -----------------------------------------------------------------------------------------


def _ogg(file: BinaryIO, size: int, start: int, name: str) -> Container:
    """Walk the pages: checksums right, numbers in order, one stream, the last page marked as last."""
    position, number, flags = start, 0, 0
    while position < size:
        head = read_at(file, position, 27)
        if head[:3] == b"TAG" and size - position == ID3V1_BYTES:
            break
        table = file.read(head[26]) if len(head) == 27 else b""
        length = 27 + len(table) + sum(table)
        if len(head) < 27 or len(table) < head[26] or position + length > size:
            raise truncated(name, size - position, max(length, 27), "bytes of its last page")
        page = head + table + file.read(sum(table))
        if page[:4] != b"OggS" or ogg_checksum(page) != page[22:26]:
            raise damaged(name, position)
        flags = page[5]
        if flags & OGG_FIRST and number:
            raise several_streams(name)
        if int.from_bytes(page[18:22], "little") != number:
            raise Unusable(f"{name} lacks a part before byte {position}; copy it again.", "damaged")
        position, number = position + length, number + 1
    if not flags & OGG_LAST:
        raise Unusable(f"{name} breaks off before its last page; copy it again.", "truncated")
    return Container("ogg")


def ogg_checksum(page: bytes) -> bytes:
    """CRC of an Ogg page, its own field taken as zero: polynomial 0x04c11db7, most significant bit first.

    zlib's is the same one with the bits of bytes and result reversed, and with inverted start and end.
    """
    mirrored = (page[:22] + bytes(4) + page[26:]).translate(MIRRORED)
    value = zlib.crc32(mirrored, UNSTATED) ^ UNSTATED
    return value.to_bytes(4, "big").translate(MIRRORED)


MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


# --- Matroska, MP4 -------------------------------------------------------------------------------


def _matroska(file: BinaryIO, size: int, name: str) -> Container:
    """Step over the elements, entering segments and clusters, whose lengths a live recorder leaves open."""
    position = 0
    while position < size:
        head = read_at(file, position, 12).ljust(12, b"\0")
        id_bytes = 9 - head[0].bit_length()
        size_bytes = 9 - head[id_bytes].bit_length() if id_bytes <= 4 else 9
        if size_bytes > 8:
            raise damaged(name, position)
        length = int.from_bytes(head[id_bytes : id_bytes + size_bytes], "big") - (1 << 7 * size_bytes)
        position += id_bytes + size_bytes
        if int.from_bytes(head[:id_bytes], "big") not in EBML_ENTERED:
            position += length
    if position > size:
        raise truncated(name, size, position, "bytes")
    return Container("matroska")


def _mov(file: BinaryIO, size: int, name: str) -> Container:
    """Step over the outermost boxes. A length of 1 means a longer field follows, 0 the rest of the file."""
    position = 0
    while position < size and len(head := read_at(file, position, 16)) >= 8:
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length == 0:
            length = size - position
        if length < 8:
            raise damaged(name, position)
        position += length
    if position > size:
        raise truncated(name, size, position, "bytes")
    return Container("mov")
