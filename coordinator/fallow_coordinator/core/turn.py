"""One turn: a command, then everything that can start because of it. The one way in which state moves.

The engine calls `take_turn` once for each command of a batch, appends all events of the batch in one transaction and
only then gives the answers and acts on the effects. Replay calls `evolve` for each record and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from fallow_coordinator.core import decide as deciding
from fallow_coordinator.core import evolve as evolving
from fallow_coordinator.core.answers import Answer
from fallow_coordinator.core.commands import Advance, Command
from fallow_coordinator.core.effects import Effect
from fallow_coordinator.core.effects_of import effects_of
from fallow_coordinator.core.events import Event
from fallow_coordinator.core.limits import STEPS_PER_TURN_MAX
from fallow_coordinator.core.names import entropy_of_step
from fallow_coordinator.core.state import State

_ADVANCE = Advance()


@dataclass(frozen=True, slots=True)
class Turn:
    """What one command brought about; the state has moved, the disk has not."""

    events: tuple[Event, ...]
    """All of them at the turn's `now_ms`, in order."""
    effects: tuple[Effect, ...]
    """To be acted on, in order, once the events are durable."""
    answer: Answer


def take_turn(state: State, command: Command, now_ms: int, entropy: bytes) -> Turn:
    """Decides `command`, evolves `state`, then advances until nothing more can start.

    `now_ms` never goes back; `entropy` is 32 fresh bytes. Raises FallowError when the command is refused: the state is
    then untouched. What the packer can do at once (inline jobs) comes back as further commands, in the same batch.
    """
    decision = deciding.decide(state, command, now_ms, entropy)
    events: list[Event] = []
    effects: list[Effect] = []
    pending = decision.events
    for step in range(1, STEPS_PER_TURN_MAX + 1):
        for event in pending:
            evolving.evolve(state, event, now_ms)
            events.append(event)
            effects.extend(effects_of(state, event))
        pending = deciding.decide(state, _ADVANCE, now_ms, entropy_of_step(entropy, step)).events
        if not pending:
            break
    return Turn(tuple(events), tuple(effects), decision.answer)
