"""Shared memory of several CTAs, with what is known of every byte."""

import numpy as np

from .arrays import UNSIGNED, Array, log2


class SharedMemory:
    """Whether a byte was written, by which warp, and which warp has read it since the last barrier.

    Arrays are flat, `pitch` bytes a CTA. Tags: 0 nobody, n + 1 warp n, MANY several warps.
    """

    MANY = 255

    def __init__(self, ctas: int, size: int, races: bool, async_proxy: bool) -> None:
        """races: whether to remember who reads and writes. async_proxy: whether wgmma or tensor copies may read."""
        self.size, self.races = size, races
        self.pitch = -(-max(size, 16) // 128) * 128
        self.bytes, self._state, self._writer, self._reader = (_aligned(ctas * self.pitch) for _ in range(4))
        self.bytes[:] = 0xFF  # NaN of every type: what nobody has written must not look like a zero
        self.data, self.writer, self.reader = _views(self.bytes), _views(self._writer), _views(self._reader)
        self.state = _views(self._state)  # 1: written, 2: a copy is on its way
        self.fences = ProxyFences(ctas * self.pitch) if races and async_proxy else None
        self.ones = {n: U(int("01" * n, 16)) for n, U in UNSIGNED.items()}  # 1 in every byte

    def flat(self, ctas: Array, addresses: Array) -> Array:
        return ctas * self.pitch + addresses

    def part(self, cta: int) -> slice:
        return slice(cta * self.pitch, (cta + 1) * self.pitch)

    def barrier(self, ctas: Array | None) -> None:
        """All threads of these CTAs have met: what each of them did before is done before all that follows."""
        if not self.races:
            return
        parts = [slice(None)] if ctas is None else [self.part(int(c)) for c in ctas]
        for part in parts:
            self._writer[part] = 0
            self._reader[part] = 0
            if self.fences is not None:
                self.fences.barrier(part)

    def unset(self, flat: Array, unit: int) -> Array | None:
        """Which units hold a byte that was not written, or is on its way."""
        wrong: Array = self.state[unit].take(flat >> log2(unit)) != self.ones[unit]
        return wrong if wrong.any() else None

    def coming(self, flat: Array, unit: int) -> Array:
        """Which units hold a byte that is on its way."""
        on_its_way: Array = self.state[unit].take(flat >> log2(unit)) & (self.ones[unit] * UNSIGNED[unit](2)) != 0
        return on_its_way

    def note_read(self, flat: Array, unit: int, tag: Array) -> Array | None:
        """Remember who reads; which units another warp has written since the last barrier."""
        at = flat >> log2(unit)
        own = tag.astype(UNSIGNED[unit]) * self.ones[unit]
        bad = self._others(self.writer[unit].take(at), own, self._writer, flat, unit, tag)
        reader = self.reader[unit]
        known = reader.take(at)
        fresh = known == 0
        if fresh.any():
            reader[at[fresh]] = own[fresh]
            known = reader.take(at)
        several = known != own
        if several.any():
            reader[at[several]] = UNSIGNED[unit](int("ff" * unit, 16))
        return bad

    def note_write(self, flat: Array, unit: int, tag: Array) -> tuple[Array | None, Array | None]:
        """Remember who writes; which units another warp has written, and which it has read."""
        at = flat >> log2(unit)
        own = tag.astype(UNSIGNED[unit]) * self.ones[unit]
        written = self._others(self.writer[unit].take(at), own, self._writer, flat, unit, tag)
        read = self._others(self.reader[unit].take(at), own, self._reader, flat, unit, tag)
        self.writer[unit][at] = own
        if self.fences is not None:
            self.fences.wrote(flat, unit, tag)
        return written, read

    @staticmethod
    def _others(known: Array, own: Array, table: Array, flat: Array, unit: int, tag: Array) -> Array | None:
        """Which units have a byte of another warp's."""
        if not ((known != 0) & (known != own)).any():
            return None
        bad = np.zeros(len(flat), np.bool_)
        for k in range(unit):
            byte = table.take(flat + k)
            bad |= (byte != 0) & (byte != tag)
        return bad if bad.any() else None

    def load(self, flat: Array, unit: int) -> Array:
        return self.data[unit].take(flat >> log2(unit))

    def store(self, flat: Array, values: Array, unit: int) -> None:
        at = flat >> log2(unit)
        self.data[unit][at] = values
        self.state[unit][at] = self.ones[unit]

    def in_flight(self, flat: Array, unit: int) -> None:
        self.state[unit][flat >> log2(unit)] = self.ones[unit] * UNSIGNED[unit](2)

    def arrived(self, flat: Array, unit: int) -> None:
        """A tensor copy is complete: its mbarrier, not a barrier of threads, orders it before those that read."""
        self.state[unit][flat >> log2(unit)] = self.ones[unit]
        self.writer[unit][flat >> log2(unit)] = 0
        self.reader[unit][flat >> log2(unit)] = 0
        if self.fences is not None:
            self.fences.clear(flat, unit)


class ProxyFences:
    """Which words were written by ordinary stores that no proxy fence has shown to the async proxy.

    A fence by the warp that stored counts, and one by any warp that has met it at a barrier since (PTX ISA 8.9.3,
    causality: a proxy fence anywhere along the path). Coarse: warps, not threads; 4-byte words; one barrier for all.
    """

    _MET = -1  # stored, and every warp has passed a barrier since

    def __init__(self, size: int) -> None:
        self.writer = np.zeros(-(-size // 4), np.int16)  # 0: clean; n + 1: stored by warp n
        self.dirty = False

    def wrote(self, flat: Array, unit: int, tag: Array) -> None:
        for word in range(max(1, unit // 4)):
            self.writer[(flat >> 2) + word] = tag
        self.dirty = True

    def clear(self, flat: Array, unit: int) -> None:
        for word in range(max(1, unit // 4)):
            self.writer[(flat >> 2) + word] = 0

    def barrier(self, part: slice) -> None:
        if self.dirty:
            words = self.writer[_in_words(part)]
            words[words > 0] = self._MET

    def fence(self, part: slice, tags: Array) -> None:
        """fence.proxy.async by these warps of a CTA, which has this part of the memory."""
        if self.dirty:
            words = self.writer[_in_words(part)]
            words[np.isin(words, [self._MET, *tags])] = 0
            self.dirty = bool(self.writer.any())

    def unfenced(self, flat: Array, unit: int) -> bool:
        return self.dirty and any(bool(self.writer[(flat >> 2) + word].any()) for word in range(max(1, unit // 4)))


def _in_words(part: slice) -> slice:
    return slice(*(None if end is None else end // 4 for end in (part.start, part.stop)))


def _views(raw: Array) -> dict[int, Array]:
    return {n: raw.view(dtype) for n, dtype in UNSIGNED.items()}


def _aligned(total: int) -> Array:
    raw = np.zeros(total + 256, dtype=np.uint8)
    at = -raw.ctypes.data % 256
    return raw[at : at + total]
