"""A game of one's own as a Gymnasium environment: riddles of reasoning-gym, three guesses each.

pip install reasoning-gym
agent-r1 check examples/reasoning_game.toml && agent-r1 train examples/reasoning_game.toml
"""

import string

import gymnasium
import reasoning_gym
from gymnasium.spaces import Text


class Riddles(gymnasium.Env):
    """The observation is a riddle, the action an answer; what counts is the dataset's own score,
    halved with every wrong guess.
    """

    action_space = Text(200, charset=string.printable)
    observation_space = Text(10_000, charset=string.printable)

    def __init__(self, dataset: str = "leg_counting", **settings) -> None:
        self._dataset, self._settings = dataset, settings

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._riddles = reasoning_gym.create_dataset(
            self._dataset, size=1, seed=seed, **self._settings
        )
        self._guesses = 0
        return self._riddles[0]["question"], {}

    def step(self, action):
        score = float(self._riddles.score_answer(action.strip(), self._riddles[0]))
        self._guesses += 1
        reward = score * 0.5 ** (self._guesses - 1) if score == 1.0 else 0.0
        done = score == 1.0 or self._guesses == 3
        return "Right." if score == 1.0 else "Wrong, guess again.", reward, done, False, {}


def register():
    gymnasium.register("Riddles-v0", entry_point=Riddles)
