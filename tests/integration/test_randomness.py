"""Reproducible randomness: noise follows from its seed and shape, whatever else happens, and is PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

import patchwire
import tiny
from conformance.hooks import assert_same, changed_logits
from integration.refusals import refused
from patchwire import GraphError, LimitError, OperationError, ShapeError

IDS = [1, 2, 3, 4, 5]
PROMPTS = [tiny.prompt(4), tiny.prompt(7), tiny.prompt(2)]


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture
def model(served) -> patchwire.Model:
    return served["gpt2"]


class TestDraws:
    def test_are_those_of_a_generator_of_pytorch_with_this_seed(self, model):
        with model.trace(IDS):
            normal = patchwire.random.normal((2, 50), seed=3).save()
            uniform = patchwire.random.uniform((2, 50), seed=4).save()
            bernoulli = patchwire.random.bernoulli((2, 50), 0.3, seed=5).save()
            randint = patchwire.random.randint((2, 50), -2, 9, seed=6).save()
            randperm = patchwire.random.randperm(20, seed=7).save()

        assert torch.equal(normal.value, torch.randn(2, 50, generator=seeded(3)))
        assert torch.equal(uniform.value, torch.rand(2, 50, generator=seeded(4)))
        assert torch.equal(bernoulli.value, (torch.rand(2, 50, generator=seeded(5)) < 0.3).float())
        assert torch.equal(randint.value, torch.randint(-2, 9, (2, 50), generator=seeded(6)))
        assert torch.equal(randperm.value, torch.randperm(20, generator=seeded(7)))

    def test_take_shape_and_dtype_of_a_value(self, model):
        with model.trace(IDS):
            hidden = model.layers[1].output
            like = patchwire.random.normal(hidden, seed=1)
            half = patchwire.random.normal(hidden.half(), seed=1)
            shaped = patchwire.random.normal(hidden.shape, seed=1)
            assert (like.shape, like.dtype) == (hidden.shape, hidden.dtype)
            patchwire.save([like, half, shaped])

        assert torch.equal(like.value, shaped.value)
        assert half.dtype is torch.float16
        assert torch.equal(half.value, like.value.half())

    def test_are_the_same_outside_of_a_block(self, model):
        with model.trace(IDS):
            inside = patchwire.random.normal((3, 7), seed=11, dtype=torch.bfloat16).save()

        assert torch.equal(inside.value, patchwire.random.normal((3, 7), seed=11, dtype=torch.bfloat16))

    def test_are_the_same_in_every_run_and_whatever_is_drawn_besides(self, model):
        with model.trace(IDS):
            first = patchwire.random.normal((4, 4), seed=2).save()
        with model.trace(IDS):
            patchwire.random.uniform((9,), seed=2).save()
            again = patchwire.random.normal((4, 4), seed=2).save()
            other = patchwire.random.normal((4, 4), seed=3).save()

        assert torch.equal(first.value, again.value)
        assert not torch.equal(first.value, other.value)

    def test_are_values_that_can_be_computed_with_and_edited(self, model):
        with model.trace(IDS):
            noise = patchwire.random.normal((2, 3), seed=1)
            noise[0] = 0
            total = (noise * 2).sum().save()

        assert torch.allclose(total.value, 2 * torch.randn(2, 3, generator=seeded(1))[1].sum())

    def test_move_a_value_about(self, model):
        with model.trace(IDS):
            hidden = model.layers[1].output[0]
            plain = hidden.clone().save()
            shuffled = hidden[patchwire.random.randperm(len(hidden), seed=9)].save()

        assert torch.equal(shuffled.value, plain.value[torch.randperm(5, generator=seeded(9))])


class TestNoiseInTheModel:
    def noise(self, shape):
        return 3 * torch.randn(shape, generator=seeded(17))

    @pytest.mark.parametrize("name", ["gpt2", "mamba"])
    def test_has_the_effect_that_the_same_noise_has_through_a_hook(self, served, references, name):
        model = served[name]
        with model.trace(IDS):
            hidden = model.layers[1].output
            hidden += 3 * patchwire.random.normal(hidden, seed=17)
            logits = model.logits.save()

        raw = model.layers[1].path
        expected = changed_logits(
            references[name], IDS, {(raw, "output", ()): lambda tensor: tensor + self.noise(tensor.shape)}
        )
        assert_same(logits.value, expected)

    def test_is_the_same_whatever_shares_the_batch(self, model):
        def noisy(with_company: bool):
            with model.trace() as trace:
                if with_company:
                    with trace.invoke(tiny.prompt(9)):
                        model.layers[1].output += patchwire.random.normal(model.layers[1].output, seed=1)
                with trace.invoke(IDS):
                    hidden = model.layers[1].output
                    hidden += patchwire.random.normal(hidden, seed=17)
                    return model.logits.save()

        assert_same(noisy(True).value, noisy(False).value)

    def test_is_the_same_in_two_invokes_that_ask_for_the_same(self, model):
        with model.trace() as trace:
            logits = []
            for _ in range(2):
                with trace.invoke(IDS):
                    hidden = model.layers[1].output
                    hidden += patchwire.random.normal(hidden, seed=17)
                    logits.append(model.logits.save())

        assert_same(logits[0].value, logits[1].value)


class TestSeedsOfRows:
    def test_give_each_row_what_its_seed_gives(self, model):
        with model.trace(IDS):
            noise = patchwire.random.normal((3, 5, 4), seed=[8, 9, 10]).save()

        assert torch.equal(noise.value, torch.stack([torch.randn(5, 4, generator=seeded(each)) for each in (8, 9, 10)]))

    def test_may_be_a_range(self, model):
        with model.trace(IDS):
            noise = patchwire.random.uniform((3, 5), seed=range(8, 11)).save()

        assert torch.equal(noise.value, torch.stack([torch.rand(5, generator=seeded(each)) for each in (8, 9, 10)]))

    def test_and_lengths_give_a_prompt_the_noise_that_it_gets_alone(self, model):
        def last_logits(prompts, seeds):
            with model.trace(prompts) as trace:
                hidden = model.layers[0].output
                lengths = [len(row) for row in trace.tokens]
                hidden += patchwire.random.normal(hidden, seed=seeds, lengths=lengths)
                return model.logits[:, -1].save()

        together = last_logits(PROMPTS, [5, 6, 7])

        for row, (prompt, seed) in enumerate(zip(PROMPTS, [5, 6, 7], strict=True)):
            assert_same(together.value[row : row + 1], last_logits([prompt], [seed]).value)

    def test_and_lengths_leave_zeros_before_short_rows(self, model):
        with model.trace(IDS):
            noise = patchwire.random.normal((2, 4, 3), seed=[1, 2], lengths=[4, 1]).save()

        assert torch.equal(noise.value[1, :3], torch.zeros(3, 3))
        assert torch.equal(noise.value[1, 3:], torch.randn(1, 3, generator=seeded(2)))


class TestRefusals:
    @pytest.mark.parametrize(
        ("draw", "write"),
        [
            (torch.randn_like, r"random\.normal\(value, seed"),
            (torch.rand_like, r"random\.uniform\(value, seed"),
            (torch.bernoulli, r"random\.uniform\(p, seed=0\) < p"),
            (lambda value: torch.normal(value, 1.0), r"random\.normal"),
            (lambda value: value.normal_(), r"random\.normal\(value, seed"),
            (lambda value: value.uniform_(), r"random\.uniform\(value, seed"),
            (lambda value: value.bernoulli_(0.5), r"random\.uniform"),
            (lambda value: torch.nn.functional.dropout(value, 0.1), r"random\.bernoulli\(value, 1 - p"),
            (lambda value: torch.randint_like(value, 5), r"random\.randint\(value, low, high"),
            (lambda value: torch.multinomial(value.exp(), 2), "before the block"),
        ],
    )
    def test_of_draws_without_a_seed_say_what_to_write(self, model, draw, write):
        with refused(OperationError, "not an operation", hint=write, line=False) as refusal, model.trace(IDS):
            draw(model.layers[0].output[0])
        assert refusal.error.lines[0].file == __file__

    def test_of_as_many_seeds_as_do_not_fit(self, model):
        with refused(ShapeError, r"2 seeds do not fit \[3, 5\]"), model.trace(IDS):
            patchwire.random.normal((3, 5), seed=[1, 2])  # this line

    def test_of_lengths_that_do_not_fit(self, model):
        with refused(ShapeError, r"lengths do not fit \[2, 5\]"), model.trace(IDS):
            patchwire.random.normal((2, 5), seed=[1, 2], lengths=[5, 6])  # this line

    def test_of_a_seed_that_is_a_value(self, model):
        with refused(OperationError, "known inside the block"), model.trace(IDS):
            patchwire.random.normal((3, 5), seed=model.layers[0].output.sum())  # this line

    def test_of_a_seed_that_is_no_number(self, model):
        with refused(ShapeError, "a seed is an int, not 1.5"), model.trace(IDS):
            patchwire.random.normal((3, 5), seed=1.5)  # this line

    def test_of_a_dtype_that_has_no_such_numbers(self, model):
        with refused(ShapeError, r"torch\.int64 is not a dtype"), model.trace(IDS):
            patchwire.random.normal((3, 5), seed=1, dtype=torch.int64)  # this line

    def test_of_what_is_no_shape(self, model):
        with refused(GraphError, "float is not a shape"), model.trace(IDS):
            patchwire.random.normal(2.5, seed=1)  # this line

    def test_of_more_than_the_server_allows(self, deep):
        with refused(LimitError, "4,000,000,000 bytes", hint="smaller parts"), deep.trace([1]):
            patchwire.random.normal((1000, 500_000), seed=1)  # this line

    def test_of_more_than_the_server_allows_before_it_is_converted(self, deep):
        with refused(LimitError, "24,000,000 bytes"), deep.trace([1]):
            patchwire.random.bernoulli((3_000_000,), 0.5, seed=1, dtype=torch.bool)  # this line

    def test_outside_of_a_block_are_those_inside(self):
        with refused(ShapeError, "2 seeds"):
            patchwire.random.normal((3, 5), seed=[1, 2])  # this line
