"""How fully codes are used: each bit's share of ones, and the entropy and number of codes of a group."""

from __future__ import annotations

from typing import Any

import numpy as np

from qlip_core.tokens import VisualTokens


class CodeUsage:
    """Running counts over tokens of L bits in groups of `group_size`.

    Memory grows with the number of distinct codes seen, at most one per token.
    """

    def __init__(self, length: int, group_size: int) -> None:
        self.length, self.group_size = length, group_size
        self.tokens = 0
        self._ones = np.zeros(length, np.int64)
        groups = length // group_size
        self._seen = [(np.empty(0, np.int64), np.empty(0, np.int64)) for _ in range(groups)]

    def add(self, tokens: VisualTokens) -> None:
        bits = tokens.bits
        self.tokens += bits.shape[0] * bits.shape[1]
        self._ones += bits.sum((0, 1), dtype=np.int64)
        groups = tokens.groups(self.group_size)  # [B, N, L/g]
        for i, (values, counts) in enumerate(self._seen):
            self._seen[i] = _merged(values, counts, groups[..., i].reshape(-1))

    def ones(self) -> np.ndarray:
        """float64 [L]: share of tokens in which each bit is 1; 0.5 is full use."""
        return self._ones / max(1, self.tokens)

    def bit_entropy(self) -> np.ndarray:
        """float64 [L]: entropy of each bit alone, in bits; 1 is full use."""
        p = np.clip(self.ones(), 1e-300, 1)
        q = np.clip(1 - self.ones(), 1e-300, 1)
        return -(p * np.log2(p) + q * np.log2(q))

    def code_entropy(self) -> np.ndarray:
        """float64 [L/g]: entropy of each group's codes as counted, in bits, at most g.

        Counting underestimates it unless there are many more tokens than codes: it cannot exceed
        log2(tokens).
        """
        out = []
        for _, counts in self._seen:
            p = counts / max(1, self.tokens)
            out.append(-(p * np.log2(p)).sum())
        return np.asarray(out)

    def codes_used(self) -> np.ndarray:
        """float64 [L/g]: distinct codes seen over the 2^g there are."""
        return np.array([len(values) for values, _ in self._seen]) / 2.0**self.group_size

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON types."""
        return {
            "tokens": self.tokens,
            "bits": self.length,
            "group_size": self.group_size,
            "share_of_ones": self.ones().tolist(),
            "bit_entropy": self.bit_entropy().tolist(),
            "code_entropy": self.code_entropy().tolist(),
            "most_code_entropy": float(min(self.group_size, np.log2(max(1, self.tokens)))),
            "share_of_codes_used": self.codes_used().tolist(),
        }


def _merged(
    values: np.ndarray, counts: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    new_values, new_counts = np.unique(codes, return_counts=True)
    merged, where = np.unique(np.concatenate([values, new_values]), return_inverse=True)
    total = np.zeros(len(merged), np.int64)
    np.add.at(total, where, np.concatenate([counts, new_counts]))
    return merged, total
