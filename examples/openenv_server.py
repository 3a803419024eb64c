"""An environment as OpenEnv has them: guess a number from 1 to 9, with hints.

pip install 'agent-r1[openenv]'
python examples/openenv_server.py 8000 &
agent-r1 check examples/openenv.toml && agent-r1 train examples/openenv.toml
"""

import random
import sys

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_app


class Guess(Action):
    guess: int


class Hint(Observation):
    hint: str


class GuessTheNumber(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self._state = State()

    def reset(self, seed=None, episode_id=None, **kwargs):
        self._number = random.Random(seed).randint(1, 9)
        self._state = State(step_count=0)
        return Hint(hint="Your guess?")

    def step(self, action, timeout_s=None, **kwargs):
        self._state.step_count += 1
        if action.guess == self._number:
            return Hint(hint="Right.", reward=1.0, done=True)
        return Hint(hint="Higher." if action.guess < self._number else "Lower.", reward=0.0)

    @property
    def state(self):
        return self._state


if __name__ == "__main__":
    app = create_app(GuessTheNumber, Guess, Hint, env_name="guess", max_concurrent_envs=64)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
