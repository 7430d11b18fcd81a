"""States of torch's generators are taken and put back together."""

from __future__ import annotations

import torch

from distopt.infer.capture.generators import generator_states, same_states, set_generator_states


def test_generators_draw_the_same_again_after_they_were_put_back():
    states = generator_states()
    drawn = torch.rand(5)
    assert not same_states(states, generator_states())
    set_generator_states(states)
    assert same_states(states, generator_states())
    assert torch.equal(torch.rand(5), drawn)


def test_generator_that_was_not_there_before_counts_as_moved():
    states = generator_states()
    assert not same_states(states, [*states, states[0]])
