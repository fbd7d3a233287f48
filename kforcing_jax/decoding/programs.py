"""The programs of an engine, compiled for shapes alone: nothing of them needs weights, or the devices to be here."""

import contextlib
import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kforcing_jax.decoding import slots as slot_states
from kforcing_jax.decoding.logprobs import width as width_of_scores
from kforcing_jax.decoding.memory import sharded_bytes
from kforcing_jax.decoding.passes import Decoding, Models, prefill, run, slots_after_a_text
from kforcing_jax.decoding.slots import Settings, Slots
from kforcing_jax.models import init_params
from kforcing_jax.models.cache import BLOCK, allocate
from kforcing_jax.models.cached import Weights, call, split, weight_shardings
from kforcing_jax.sharding import ROWS, abstract_on, batch_sharding, platform, replicated


class Report(NamedTuple):
    """What the host has to know after a step, in arrays of its own: the state that they are taken from is donated."""

    tokens_BxS: jax.Array
    length_B: jax.Array
    running_B: jax.Array
    finite_B: jax.Array
    passes_B: dict[str, jax.Array]
    kept_BxM: jax.Array


@dataclasses.dataclass(frozen=True)
class Programs:
    """What the programs of an engine are compiled for. Engines that agree in it share them.

    By key, what a program takes and gives:

    - `empty`: () -> `Decoding` without requests
    - `insert`: student's weights by name, slots, is_new_B, settings, tokens_BxS, noise_BxS, is_given_B -> slots
    - `clear`: caches, row -> caches with an empty row
    - `prefill`, model, rows, chunk, live, True if scored: weights, slots, caches, the row if `rows` is "one" ->
      slots, caches
    - `scores`: scores_BxSxC, first_B -> scores of `BLOCK` positions of every row, from its first one on
    - `run`, mode, live: weights by name, `Decoding` with the caches of the mode's models, alive_B, passes, wait ->
      the same `Decoding` later, `Report`

    Slots and caches are donated. No text may be longer than `live` less what a pass writes beyond it.
    """

    models: Models
    slots: int
    positions: int
    mesh: Mesh | None

    def compiled(self, *key: Any) -> jax.stages.Compiled:
        """A program, compiled when it is first asked for."""
        return _compiled(self, key)[0]

    def seconds(self, *key: Any) -> float:
        """What compiling a program took."""
        return _compiled(self, key)[1]

    def temporary_bytes(self, *key: Any) -> int:
        """`temporary_bytes` of a program."""
        return temporary_bytes(self.compiled(*key))

    @property
    def state_bytes(self) -> int:
        """Bytes that slots and caches take on a device."""
        return _state_bytes(self)

    @property
    def lives(self) -> list[int]:
        """How many slots of a cache programs attend over: on a CPU a loop finds its own end."""
        with self.on_mesh():
            if platform() == "cpu":
                return [self.positions]
        lengths = [BLOCK * 2**i for i in range(1, 32) if BLOCK * 2**i < self.positions]
        return [*lengths, self.positions]

    def live_for(self, length: int) -> int:
        """The least of `lives` for texts of up to `length` tokens."""
        needed = min(length + slots_after_a_text(self.models), self.positions)
        return next(live for live in self.lives if live >= needed)

    def lower(self, *key: Any) -> jax.stages.Lowered:
        """A program for the platform of the mesh, not compiled yet."""
        return self.trace(*key).lower()

    def trace(self, *key: Any) -> jax.stages.Traced:
        """A program as JAX sees it, for no platform yet."""
        name, *options = key
        function, arguments, donated, shardings = getattr(self, f"_{name}")(*options)
        out = {} if self.mesh is None else {"out_shardings": shardings}
        with self.on_mesh():
            return jax.jit(function, donate_argnums=donated, **out).trace(*arguments)

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """The context in which programs are traced."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    @functools.cached_property
    def state(self) -> Decoding:
        """Abstract, on a mesh with shardings."""
        return self._state_shapes if self.mesh is None else abstract_on(self._state_shapes, self._state_shardings)

    @functools.cached_property
    def _state_shapes(self) -> Decoding:
        with self.on_mesh():
            return jax.eval_shape(self._no_requests)

    @functools.cached_property
    def weights(self) -> dict[str, Weights]:
        """Of every model, abstract."""
        return {name: self._abstract_weights(getattr(self.models, name)) for name in self.models.names}

    def _abstract_weights(self, model):
        whole = jax.eval_shape(lambda key: split(model.cfg, init_params(model, key)), jax.random.key(0))
        return whole if self.mesh is None else abstract_on(whole, weight_shardings(whole, self.mesh))

    @functools.cached_property
    def _state_shardings(self) -> Decoding | None:
        """Rows over `data` and `fsdp`, heads over `tensor`."""
        if self.mesh is None:
            return None
        heads = NamedSharding(self.mesh, PartitionSpec(ROWS, "tensor"))
        rows = batch_sharding(self.mesh)
        slots = jax.tree.map(lambda _: rows, self._state_shapes.slots)
        return Decoding(slots, jax.tree.map(lambda _: heads, self._state_shapes.caches))

    def _part(self, names, state):
        """A state with the caches of some models; None of None."""
        return state and Decoding(state.slots, {name: state.caches[name] for name in names})

    def _empty(self):
        return self._no_requests, (), (), self._state_shardings

    def _no_requests(self) -> Decoding:
        caches = {}
        for name in self.models.names:
            cfg = getattr(self.models, name).cfg
            shape = self.slots, cfg.kv_heads, self.positions, cfg.head_width
            caches[name] = tuple(allocate(*shape, cfg.dtype) for _ in range(cfg.num_layers))
        student, causal = self.models.student, self.models.causal
        width = student.cfg.d_model if student else 0
        scores = width_of_scores(causal.cfg.vocab_size) if causal else 0
        sizes = self.models.k + 1, width, scores, self.models.drafts_ahead
        return Decoding(Slots.empty(self.slots, self.positions, self.models.names, *sizes), caches)

    def _insert(self):
        flag_B, texts = np.zeros(self.slots, bool), (self.slots, self.positions)
        host = flag_B, Settings.empty(self.slots), np.zeros(texts, np.int32), np.zeros(texts, np.float32), flag_B
        student = {name: self.weights[name] for name in ("student",) if name in self.weights}
        shardings = self._state_shardings and self._state_shardings.slots
        return self._with_requests, (student, self.state.slots, *host), 1, shardings

    def _with_requests(self, student, slots, is_new_B, settings, tokens_BxS, noise_BxS, is_given_B):
        of_tau_BxD = slots.of_tau_BxD
        if self.models.student is not None:
            of_tau_BxD = call(self.models.student, student["student"], "of_tau", settings.tau_B)
        return slot_states.insert(slots, is_new_B, settings, tokens_BxS, noise_BxS, is_given_B, of_tau_BxD)

    def _clear(self):
        def function(caches, row):
            def cleared(x):
                return jax.lax.dynamic_update_slice_in_dim(x, jnp.zeros_like(x[:1]), row, axis=0)

            return jax.tree.map(cleared, caches)

        shardings = self._state_shardings and self._state_shardings.caches
        return function, (self.state.caches, np.int32(0)), 0, shardings

    def _prefill(self, name, rows, chunk, live, scored=False):
        function = functools.partial(prefill, self.models, name, chunk, live, scored=scored)
        row = () if rows == "all" else (np.int32(0),)
        shardings = self._state_shardings and (self._state_shardings.slots, self._state_shardings.caches[name])
        return function, (self.weights[name], self.state.slots, self.state.caches[name], *row), (1, 2), shardings

    def _scores(self):
        def function(scores_BxSxC, first_B):
            return jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, BLOCK))(scores_BxSxC, first_B)

        arguments = self.state.slots.scores_BxSxC, np.zeros(self.slots, np.int32)
        return function, arguments, (), self.mesh and replicated(self.mesh)

    def _run(self, mode, live):
        def function(weights, state, alive_B, passes, wait):
            state = run(self.models, mode, live, weights, state, alive_B, passes, wait)
            slots = state.slots
            return state, Report(
                slots.tokens_BxS,
                slots.length_B,
                slots.running_B,
                slots.finite_B,
                jax.tree.map(jnp.copy, slots.passes_B),
                jnp.copy(slots.kept_BxM),
            )

        names = self.models.of_mode(mode)
        chosen = {name: self.weights[name] for name in names}
        arguments = chosen, self._part(names, self.state), np.zeros(self.slots, bool), np.int32(0), np.bool_(False)
        # Every process of a run wants the whole report.
        shardings = self.mesh and (self._part(names, self._state_shardings), replicated(self.mesh))
        return function, arguments, 1, shardings


@functools.lru_cache(maxsize=128)
def _compiled(programs: Programs, key: tuple) -> tuple[jax.stages.Compiled, float]:
    start = time.perf_counter()
    return programs.lower(*key).compile(), time.perf_counter() - start


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """What a program needs on a device besides its arguments; 0 where the platform does not say."""
    analysis = program.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes


@functools.lru_cache(maxsize=128)
def _state_bytes(programs: Programs) -> int:
    return sum(map(sharded_bytes, jax.tree.leaves(programs.state)))
