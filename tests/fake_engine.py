"""An engine without a model: texts that only their request decides, with or without others beside them."""

import threading
import time
import types

import numpy as np

from kforcing_jax.decoding import Update
from kforcing_jax.errors import DataError


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class FakeEngine:
    """`decoding.engine.Engine` as far as a server knows it, on a vocabulary of `size` ids."""

    def __init__(self, slots=2, max_length=32, k=2, size=98, modes=("student", "ar", "exact"), seconds=0.0):
        self.slots, self.max_length, self.modes, self.size = slots, max_length, modes, size
        self.models = types.SimpleNamespace(k=k)
        self.texts = {}  # slot -> [request, its tokens, how many were told, parts of its prompt to be read]
        self.inserted, self.steps = [], []
        self.failures = []  # exceptions that the next steps raise
        self.seconds = seconds  # of a step
        self.gate = threading.Event()  # closed, a step does not end
        self.gate.set()

    @property
    def free_slots(self):
        return self.slots - len(self.texts)

    def check(self, request):
        outside = [i for i in request.prompt if not 0 <= i < self.size]
        if outside:
            raise DataError(f"prompt has {outside[0]}, which is not in [0, {self.size})")
        if request.k and request.k > self.models.k:
            raise DataError(f"k = {request.k} exceeds the window of {self.models.k} tokens")

    def insert(self, request):
        self.check(request)
        slot = next(slot for slot in range(self.slots) if slot not in self.texts)
        self.texts[slot] = [request, self.expected(request), 0, len(request.prompt) // 16]
        self.inserted.append(request)
        return slot

    def expected(self, request):
        """The whole text that a request gets."""
        random = np.random.default_rng([request.seed, *request.prompt])
        tokens = random.integers(4, self.size - 1, request.max_new_tokens).tolist()
        ends = [n for n, token in enumerate(tokens) if token in request.end_ids]
        return tokens[: ends[0] + 1] if ends else tokens

    def step(self, passes, *, wait=True, chunks=None):
        self.gate.wait()
        time.sleep(self.seconds)
        if self.failures:
            raise self.failures.pop(0)
        self.steps.append((passes, wait, chunks))
        return [self._update(slot, passes) for slot in sorted(self.texts)]

    def _update(self, slot, passes):
        text = self.texts[slot]
        request, tokens, told, unread = text
        if unread:
            text[3] -= 1
            return Update(slot, [], False, {"student": 0}, (0,) * (self.models.k + 1))
        new = tokens[told : told + passes * (request.k or self.models.k)]
        text[2] += len(new)
        is_finished = text[2] == len(tokens)
        if is_finished:
            del self.texts[slot]
        passes_so_far = -(-(told + len(new)) // self.models.k)
        return Update(slot, new, is_finished, {"student": passes_so_far}, (passes_so_far,) * (self.models.k + 1))

    def free(self, slot):
        if slot not in self.texts:
            raise DataError(f"slot {slot} has no request")
        del self.texts[slot]

    def release(self):
        self.texts.clear()
