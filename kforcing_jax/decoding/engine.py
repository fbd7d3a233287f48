"""The engine: a fixed number of slots on a device, requests that come and go, a few programs compiled once.

    engine = Engine(student=(model, params), slots=8, max_length=1024, k=4)
    slot = engine.insert(Request(prompt, max_new_tokens=64, seed=3))
    for update in engine.step(passes=4):
        update.slot, update.tokens, update.is_finished

What a request gives does not depend on the others, nor on when it came: its rows of every array are its own, and its
noise belongs to its seed and its positions.
"""

import concurrent.futures
import copy
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding

from kforcing_jax.decoding.logprobs import Logprobs
from kforcing_jax.decoding.memory import Memory, bytes_left, check_memory, sharded_bytes
from kforcing_jax.decoding.passes import Decoding, Models, slots_after_a_text
from kforcing_jax.decoding.programs import Programs, Report, temporary_bytes
from kforcing_jax.decoding.requests import Request, check_count, check_mode, is_whole_number
from kforcing_jax.decoding.slots import Settings
from kforcing_jax.errors import DataError
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.models.cache import BLOCK
from kforcing_jax.models.cached import weights
from kforcing_jax.models.gated import base_params
from kforcing_jax.sharding import to_host

# Prompts are read this many tokens at a time.
CHUNKS = (16, 64)
# More passes than any text has tokens.
_ALL = 2**30


@dataclasses.dataclass(frozen=True)
class Update:
    """What a step gave a request.

    Attributes:
      slot: where it runs, or ran.
      tokens: the new ones.
      is_finished: it has ended, and its slot is free.
      passes: so far, by model.
      kept: how many passes so far kept more than 0, 1, ... k tokens, k that of the engine; their sum is the number of
        tokens so far. In mode `exact` draft j was accepted in kept[j + 1] passes.
      logprobs: of the new tokens, if the request asked for them.
      prompt_logprobs: of the prompt's tokens but the first, in the first update after the prompt was read.
      error: why it was stopped before its end, if it was.
    """

    slot: int
    tokens: list[int]
    is_finished: bool
    passes: dict[str, int]
    kept: tuple[int, ...]
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    error: DataError | None = None


class Engine:
    """Decodes up to `slots` requests at a time, each by itself, in any mode that its models allow."""

    def __init__(
        self,
        *,
        student: tuple | None = None,
        teacher: tuple | None = None,
        slots: int = 8,
        max_length: int = 1024,
        k: int = 1,
        dtype: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        exact_windows: int | None = None,
    ):
        """Compiles and allocates nothing yet.

        Args:
          student: (PushForwardLM, params), for modes `student` and `exact`; a gated one alone for all modes.
          teacher: (CausalLM, params), for modes `ar` and `exact`. One of the same arrays as a gated student's is the
            one in it; another one is a model of its own.
          slots: requests at a time; on a mesh rounded up to what can be split over its rows.
          max_length: positions of a text, prompt included.
          k: the largest window, at most that which the student was trained with.
          dtype: compute dtype of the blocks and of the caches, instead of the models' own.
          mesh: `data` splits slots, `tensor` heads and columns. By default that of the parameters, if they have one.
          exact_windows: of a gated student alone: how many windows a pass of mode `exact` drafts beside what it
            verifies, by default k, one for each place where the drafts may stop being right. With fewer they are where
            that is likeliest. 0: a pass that drafts and one that verifies in turns. The tokens are the same.

        Raises:
          DataError: no model, models of different vocabularies, numbers below 1 or out of their range.
        """
        given = {name: pair for name, pair in (("student", student), ("teacher", teacher)) if pair is not None}
        _check_engine(given, slots, max_length, k)
        given = _apart(given)
        mesh = _mesh_of(given) if mesh is None else mesh
        in_dtype = {name: _in_dtype(model, dtype) for name, (model, _) in given.items()}
        models = Models(in_dtype.get("student"), in_dtype.get("teacher"), k if student is not None else 1)
        models = dataclasses.replace(models, exact_windows=_exact_windows(models, exact_windows))
        self.programs = programs_for(models, slots, max_length, mesh)
        self.weights = {name: weights(models.config(name), given[name][1], mesh) for name in given}
        self.max_length = max_length
        self._compiled: dict[tuple, jax.stages.Compiled] = {}
        self.seconds = 0.0  # that programs ran, and were waited for
        self.release()

    # What a caller sees.

    def with_slots(self, slots: int) -> "Engine":
        """Another one of the same weights, without requests: what they were made of need not be there any more."""
        check_count("slots", slots)
        other = copy.copy(self)
        other.programs = programs_for(self.models, slots, self.max_length, self.programs.mesh)
        other._compiled, other.seconds = {}, 0.0
        other.release()
        return other

    @property
    def free_slots(self) -> int:
        """How many slots have no request."""
        return self._requests.count(None)

    @property
    def modes(self) -> tuple[str, ...]:
        """Those that the models allow."""
        return self.models.modes

    def check(self, request: Request) -> None:
        """Raises DataError or ConfigError for a request that this engine cannot serve."""
        request.check(self._vocab_size)
        self._check_models(request.mode)
        if request.k is not None and request.mode != "ar" and request.k > self.models.k:
            raise DataError(f"k = {request.k} exceeds the window of {self.models.k} tokens")
        if request.end > self.max_length:
            raise DataError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones exceed the "
                f"{self.max_length} positions of a slot"
            )

    def _check_models(self, mode: str):
        for name in self.models.of_mode(mode):
            if name not in self.models.names:
                raise DataError(f"mode = {mode!r} needs {name}=(model, params)")

    def insert(self, request: Request) -> int:
        """Gives a request a slot; the next step begins with it.

        Raises:
          DataError, ConfigError: what `check` raises, or no slot is free.
          RunError: the device's memory does not suffice for the slots.
        """
        self.check(request)
        if not self.free_slots:
            raise DataError(f"all {self.slots} slots are taken; step until a request ends, or free one")
        if self._state is None:
            if not self._compiled:
                self._program(("run", request.mode, self.programs.lives[-1]))
            self._allocate()
        slot = self._requests.index(None)
        self._requests[slot] = request
        self._told[slot] = len(request.prompt)
        self._new.append(slot)
        if request.prompt_logprobs:
            self._owed.add(slot)
        return slot

    def step(self, passes: int = _ALL, *, wait: bool = True, chunks: int | None = None) -> list[Update]:
        """Reads new prompts, and gives every request up to `passes` passes of its mode.

        Args:
          passes: of every request whose prompt is read.
          wait: if not, returns as soon as a request of a mode has ended, whose slot another one may want.
          chunks: parts of prompts, of up to 64 tokens, that are read before the passes; new prompts take turns. A
            program that reads a part of all slots counts as so many; one always runs. None reads all, 0 none. What
            does not depend on it: the tokens.

        Returns:
          An update for every request that was running, or waits for its prompt to be read.

        Raises:
          DataError: passes or chunks that are no number of them.
          RunError: the device's memory does not suffice for a program that is compiled now.
        """
        for name, value in (("passes", passes), ("chunks", 0 if chunks is None else chunks)):
            if not is_whole_number(value) or value < 0:
                raise DataError(f"{name} = {value!r} should be a whole number, 0 or more")
        if self._new:
            self._admit()
        self._read_prompts(chunks)
        unread = {slot for slot, _ in self._reading}
        running = {slot: request for slot, request in enumerate(self._requests) if request is not None}
        ready = {slot: request for slot, request in running.items() if slot not in unread}
        if not ready:
            return [self._unread(slot) for slot in running]
        report = self._run_modes(ready, passes, wait)
        scores = self._new_scores(ready, report)
        return [self._update(slot, report, scores[slot]) if slot in ready else self._unread(slot) for slot in running]

    def free(self, slot: int) -> None:
        """Drops a request; its slot is free at once. Raises DataError when there is none in it."""
        if slot not in range(self.slots) or self._requests[slot] is None:
            raise DataError(f"slot {slot} has no request")
        self._requests[slot] = None
        self._unclean.add(slot)
        self._owed.discard(slot)
        for key in [key for key in self._reading if key[0] == slot]:
            del self._reading[key]
        if slot in self._new:
            self._new.remove(slot)

    def warm_up(self, modes: Iterable[str] | None = None, told: Callable[[tuple, float], None] | None = None) -> None:
        """Compiles all that requests of these modes can need, by default of all that the models allow, and allocates.

        After it nothing compiles, whatever requests come.

        Args:
          modes: of the requests to come.
          told: is called with the key of every program (`Programs`) and the seconds that compiling it took, as soon as
            it is done, from threads of the compilation, one call at a time.

        Raises:
          DataError: a mode that the models do not allow.
          RunError: the device's memory does not suffice for the slots.
        """
        modes = self.modes if modes is None else tuple(modes)
        for mode in modes:
            check_mode(mode)
            self._check_models(mode)
        lives, rows = self.programs.lives, ("all", "one") if self._reads_one_row else ("all",)
        others: list[tuple] = [("clear",)]
        if _reports_scores(modes):
            others.append(("scores",))
            name = self.models.causal_name
            others += [("prefill", name, rows[-1], chunk, live, True) for live in lives for chunk in CHUNKS]
        self._compile(modes, lives, others, rows, told)
        if self._state is None:
            self._allocate()

    def prepare(self, mode: str, longest: int) -> None:
        """Compiles what requests of a mode can need that start together, with texts of up to `longest` tokens.

        Less than `warm_up`, and enough where as many requests as there are slots come at once.
        """
        lives = self.programs.lives
        self._compile([mode], lives[: lives.index(self.programs.live_for(longest)) + 1], [], ("all",))

    def largest_programs(self, modes: Iterable[str]) -> list[tuple]:
        """The keys of those that need most memory, of what requests of these modes run."""
        live, models, modes = self.programs.lives[-1], self.models, tuple(modes)
        run = [("run", mode, live) for mode in modes]
        names = dict.fromkeys(name for mode in modes for name in models.of_mode(mode))
        read = [("prefill", name, "all", CHUNKS[-1], live) for name in names]
        scored = ("prefill", models.causal_name, "one" if self._reads_one_row else "all", CHUNKS[-1], live, True)
        return run + read + [scored] * _reports_scores(modes)

    def release(self) -> None:
        """Gives the memory of slots and caches back; requests are dropped, what was compiled is kept."""
        self._state: Decoding | None = None
        self._requests: list[Request | None] = [None] * self.slots
        self._told = [0] * self.slots  # tokens of each text that were reported
        self._new: list[int] = []
        self._reading: dict[tuple[int, str], int] = {}  # by slot and model: how much of its prompt was read, in turn
        self._owed: set[int] = set()  # slots whose prompts' log-probabilities were asked for and not reported
        self._unclean: set[int] = set()  # rows whose caches may hold what is no number

    @property
    def memory(self) -> Memory:
        """What there is on a device, or will be."""
        return Memory(
            weights=sum(map(sharded_bytes, jax.tree.leaves(self.weights))),
            caches=self.programs.state_bytes,
            programs=max(map(temporary_bytes, self._compiled.values()), default=0),
            left=bytes_left(self.device),
        )

    # What happens to slots.

    @property
    def device(self) -> jax.Device:
        """One of them."""
        mesh = self.programs.mesh
        return jax.local_devices()[0] if mesh is None else mesh.local_devices[0]

    @property
    def _reads_one_row(self) -> bool:
        """Whether a prompt that comes alone is read alone: a row of a mesh's arrays is on some of its devices only."""
        return self.slots > 1 and self.programs.mesh is None

    @property
    def models(self) -> Models:
        """Student and teacher, in the dtype that they decode in, and the largest window."""
        return self.programs.models

    @property
    def slots(self) -> int:
        """How many requests run at a time."""
        return self.programs.slots

    @property
    def positions(self) -> int:
        """Of a slot: the longest text, and what passes write beyond it."""
        return self.programs.positions

    @property
    def _no_scores(self) -> np.ndarray:
        return np.zeros((0, self.programs.state.slots.scores_BxSxC.shape[-1]), np.float32)

    @property
    def _vocab_size(self):
        return self.models.config(self.models.names[0]).vocab_size

    @property
    def _held(self) -> Decoding:
        """The state, which is there from the first request on."""
        assert self._state is not None
        return self._state

    def _request(self, slot: int) -> Request:
        """That of a slot which is taken."""
        request = self._requests[slot]
        assert request is not None
        return request

    def _compile(self, modes, lives, others, rows, told=None):
        """Compiles what these modes need, some programs at a time."""
        lock = threading.Lock()

        def compiled(key):
            program = self.programs.compiled(*key)
            if told is not None:
                with lock:
                    told(key, self.programs.seconds(*key))
            return program

        names = dict.fromkeys(name for mode in modes for name in self.models.of_mode(mode))
        wanted = [("empty",), ("insert",), *others]
        wanted += [("run", mode, live) for live in lives for mode in modes]
        wanted += [("prefill", n, r, chunk, live) for live in lives for n in names for r in rows for chunk in CHUNKS]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for key, program in zip(wanted, pool.map(compiled, wanted), strict=True):
                self._compiled[key] = program

    def _program(self, key: tuple):
        """A program that fits into what the device has left beside the slots."""
        if key not in self._compiled:
            self._compiled[key] = self.programs.compiled(*key)
            if self._state is not None:
                self._check_memory(0, temporary_bytes(self._compiled[key]))
        return self._compiled[key]

    def _allocate(self):
        """Slots and caches, if the memory suffices for them and for the largest of the programs so far."""
        temporary = max(map(temporary_bytes, self._compiled.values()))
        self._check_memory(self.programs.state_bytes, temporary)
        self._state = self._program(("empty",))()

    def _check_memory(self, state: int, temporary: int):
        check_memory(state, temporary, self.slots, self.positions, self.device)

    def _shares(self, running, passes: int, wait: bool):
        """(how many slots of the caches are live, passes) of one program after the other.

        Texts grow by k + 1 tokens a pass at most, and programs that see less of the caches are faster.
        """
        longest, end = max(self._told[slot] for slot in running), max(request.end for request in running.values())
        done = 0
        while done < passes or not done:
            live = self.programs.live_for(min(longest + self.models.k + 1, end))
            room = (live - slots_after_a_text(self.models) - longest) // (self.models.k + 1)
            share = passes - done if live == self.programs.live_for(end) else min(max(room, 1), passes - done)
            yield live, share
            done, longest = done + share, longest + share * (self.models.k + 1)
            if longest >= end or not wait or not passes:
                return

    def _run_modes(self, ready, passes: int, wait: bool) -> Report:
        for live, share in self._shares(ready, passes, wait):
            for mode in dict.fromkeys(request.mode for request in ready.values()):
                report = self._run(mode, live, share, wait)
        return self._fetched(report)

    def _fetched(self, arrays):
        start = time.perf_counter()
        arrays = jax.tree.map(to_host, arrays)
        self.seconds += time.perf_counter() - start
        return arrays

    def _run(self, mode: str, live: int, passes: int, wait: bool) -> Report:
        names = self.models.of_mode(mode)
        state, report = self._call(
            ("run", mode, live),
            {name: self.weights[name] for name in names},
            Decoding(self._held.slots, {name: self._held.caches[name] for name in names}),
            np.array([request is not None for request in self._requests]),
            np.int32(passes),
            np.bool_(wait),
        )
        self._state = Decoding(state.slots, self._held.caches | state.caches)
        return report

    def _admit(self):
        """Puts new requests into their rows."""
        self._clear_rows(self._unclean.intersection(self._new))
        settings = Settings.empty(self.slots)
        is_new_B, is_given_B = np.zeros((2, self.slots), bool)
        tokens_BxS = np.zeros((self.slots, self.positions), np.int32)
        noise_BxS = np.zeros((self.slots, self.positions), np.float32)
        for slot in self._new:
            request = self._request(slot)
            settings.fill(slot, request, request.k or self.models.k)
            tokens_BxS[slot, : len(request.prompt)] = request.prompt
            is_new_B[slot], is_given_B[slot] = True, request.noise is not None
            if request.noise is not None:
                noise_BxS[slot, len(request.prompt) : request.end] = request.noise
        student = {name: self.weights[name] for name in ("student",) if name in self.weights}
        slots = self._call(
            ("insert",), student, self._held.slots, is_new_B, settings, tokens_BxS, noise_BxS, is_given_B
        )
        self._state = self._held._replace(slots=slots)
        new, self._new = self._new, []
        for slot in new:
            for name in self.models.of_mode(self._request(slot).mode):
                if self._to_read(slot):
                    self._reading[slot, name] = 0

    def _clear_rows(self, rows: Iterable[int]):
        """Slots that are not seen have weight 0, but 0 times a NaN that the last request of a row left is NaN."""
        for row in rows:
            self._state = self._held._replace(caches=self._call(("clear",), self._held.caches, np.int32(row)))
            self._unclean.remove(row)

    def _to_read(self, slot: int) -> int:
        """Tokens of a prompt that are read before the first pass: all but the last."""
        return len(self._request(slot).prompt) - 1

    def _read_prompts(self, chunks: int | None):
        """Prompts into the models' caches, up to so many parts of them."""
        done = 0
        while self._reading and (chunks is None or done < chunks):
            done += self._read_chunk(*next(iter(self._reading)))

    def _read_chunk(self, slot: int, name: str) -> int:
        """The next chunk of a prompt, or of all prompts together where most slots have one: how many rows it reads."""
        slots = [other for other, model in self._reading if model == name]
        scored = name == self.models.causal_name and bool(self._owed.intersection(slots))
        is_alone = self._reads_one_row and (scored or 2 * len(slots) < self.slots)
        if is_alone:
            slots, scored = [slot], scored and slot in self._owed
        read = {slot: self._reading.pop((slot, name)) for slot in slots}
        left = max(self._to_read(slot) - done for slot, done in read.items())
        chunk = next((c for c in CHUNKS if left <= 2 * c), CHUNKS[-1])
        rows, row = ("one", (np.int32(slot),)) if is_alone else ("all", ())
        key = "prefill", name, rows, chunk, self.programs.live_for(max(read.values()) + chunk), *([True] * scored)
        new, caches = self._call(key, self.weights[name], self._held.slots, self._held.caches[name], *row)
        self._state = Decoding(new, self._held.caches | {name: caches})
        # Those that are not done go to the end.
        self._reading |= {(s, name): done + chunk for s, done in read.items() if done + chunk < self._to_read(s)}
        return 1 if is_alone else self.slots

    def _call(self, key: tuple, *arguments):
        """A program's result; what compiling it takes does not count as time of the engine."""
        program = self._program(key)
        start = time.perf_counter()
        result = program(*arguments)
        self.seconds += time.perf_counter() - start
        return result

    def _new_scores(self, ready, report: Report) -> dict[int, np.ndarray | None]:
        """By slot: scores_NxC of what is to be told of, None where nothing is asked. Of prompts these come first."""
        first = {slot: 1 if slot in self._owed else self._told[slot] for slot in ready}
        end = {slot: int(report.length_B[slot]) for slot, request in ready.items() if request.logprobs is not None}
        found = {slot: [self._no_scores] for slot in end}
        for done in range(0, max((end[slot] - first[slot] for slot in end), default=0), BLOCK):
            first_B = np.zeros(self.slots, np.int32)
            first_B[list(end)] = [min(first[slot] + done, self.max_length) for slot in end]
            scores_BxNxC = self._fetched(self._call(("scores",), self._held.slots.scores_BxSxC, first_B))
            for slot in end:
                found[slot].append(scores_BxNxC[slot, : max(end[slot] - first[slot] - done, 0)])
        return {slot: np.concatenate(found[slot]) if slot in end else None for slot in ready}

    def _unread(self, slot: int) -> Update:
        """Of a request whose prompt is not read yet."""
        passes, kept, wanted = (
            dict.fromkeys(self.models.names, 0),
            (0,) * (self.models.k + 1),
            self._request(slot).logprobs,
        )
        return Update(slot, [], False, passes, kept, None if wanted is None else Logprobs.of(self._no_scores, wanted))

    def _update(self, slot: int, report: Report, scores_NxC: np.ndarray | None) -> Update:
        request, logprobs, of_prompt = self._request(slot), None, None
        if scores_NxC is not None and request.logprobs is not None:
            in_prompt = self._to_read(slot) if slot in self._owed else 0
            logprobs = Logprobs.of(scores_NxC[in_prompt:], request.logprobs)
            of_prompt = Logprobs.of(scores_NxC[:in_prompt], request.logprobs) if slot in self._owed else None
            self._owed.discard(slot)
        length, is_finite = int(report.length_B[slot]), bool(report.finite_B[slot])
        tokens = report.tokens_BxS[slot, self._told[slot] : length].tolist()
        self._told[slot] = length
        is_finished = not report.running_B[slot]
        if is_finished:
            self._requests[slot] = None
        if not is_finite:
            self._unclean.add(slot)
        passes = {name: int(passes_B[slot]) for name, passes_B in report.passes_B.items()}
        kept, error = tuple(report.kept_BxM[slot].tolist()), None if is_finite else DataError(_NOT_FINITE)
        return Update(slot, tokens, is_finished, passes, kept, logprobs, of_prompt, error)


_NOT_FINITE = (
    "the logits are not finite: the weights are damaged, or were trained with a learning rate that was too high"
)


def programs_for(models: Models, slots: int, max_length: int, mesh: Mesh | None) -> Programs:
    """Those of an engine for texts of up to `max_length` tokens."""
    beyond = max(slots_after_a_text(models), CHUNKS[-1])
    return Programs(models, _rows(slots, mesh), _rounded_up(max_length + beyond, BLOCK), mesh)


def _check_engine(given, slots, max_length, k):
    if not given:
        raise DataError("an engine needs student=(model, params), teacher=(model, params), or both")
    for name, value in (("slots", slots), ("max_length", max_length), ("k", k)):
        check_count(name, value)
    for name, kind in (("student", PushForwardLM), ("teacher", CausalLM)):
        if name in given and not (isinstance(given[name], tuple) and isinstance(given[name][0], kind)):
            raise DataError(f"{name} should be ({kind.__name__}, params)")
    sizes = {name: model.cfg.vocab_size for name, (model, _) in given.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(
            f"the teacher has a vocabulary of {sizes['teacher']} tokens, the student one of {sizes['student']}"
        )


def _apart(given):
    """Every model's own parameters; no teacher where it is the one in a gated student."""
    if "teacher" not in given:
        return given
    (model, params), student = given["teacher"], given.get("student")
    if student is not None and has_teacher(student, given["teacher"]):
        return {"student": student}
    return given | {"teacher": (model, base_params(params))}


def has_teacher(student: tuple, teacher: tuple) -> bool:
    """Whether a teacher is the one in a gated student: of the same arrays."""
    if not student[0].cfg.is_gated:
        return False
    ours, theirs = (flatten_dict(base_params(params)) for _, params in (student, teacher))
    return ours.keys() == theirs.keys() and all(leaf is theirs[path] for path, leaf in ours.items())


def _exact_windows(models, wanted) -> int:
    if not models.is_shared:
        if wanted is not None:
            raise DataError(f"exact_windows = {wanted!r} has no effect without a gated student that is its own teacher")
        return 0
    if wanted is not None and not (is_whole_number(wanted) and 0 <= wanted <= models.k):
        raise DataError(f"exact_windows = {wanted!r} should be a whole number from 0 to k = {models.k}")
    return models.k if wanted is None else wanted


def _reports_scores(modes) -> bool:
    """Whether requests of these modes may ask for log-probabilities: those whose tokens a teacher draws."""
    return any(mode != "student" for mode in modes)


def _in_dtype(model, dtype):
    if dtype not in (None, "float32", "bfloat16"):
        raise DataError(f"dtype = {dtype!r} is not one of float32, bfloat16")
    return model if dtype is None else type(model)(dataclasses.replace(model.cfg, dtype=dtype))


def _mesh_of(given) -> Mesh | None:
    """The mesh on which the parameters lie, if there is one."""
    shardings = [getattr(x, "sharding", None) for _, params in given.values() for x in jax.tree.leaves(params)]
    meshes = (s.mesh for s in shardings if isinstance(s, NamedSharding))
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh) and mesh.size > 1), None)


def _rows(slots, mesh):
    """Slots, rounded up to what splits evenly."""
    return slots if mesh is None else _rounded_up(slots, mesh.shape["data"] * mesh.shape["fsdp"])


def _rounded_up(number, unit):
    return number + -number % unit
