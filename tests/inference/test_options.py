"""What is unset is the model's own where that samples, else greedy."""

import pytest
from pydantic import ValidationError

from instil.inference import Sampling, SamplingOptions

OWN = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "eos_token_id": 3}


def test_greedy_unless_the_model_says_otherwise():
    assert SamplingOptions().resolve() == Sampling(temperature=0.0)
    assert SamplingOptions().resolve({**OWN, "do_sample": False}).greedy


def test_the_models_own_fill_what_is_unset():
    found = SamplingOptions(top_k=5, seed=7).resolve(OWN)
    assert found == Sampling(temperature=0.6, top_k=5, top_p=0.95, repetition_penalty=1.05, seed=7)
    assert SamplingOptions(temperature=0).resolve(OWN).greedy
    assert SamplingOptions().resolve({"do_sample": True}).temperature == 1.0


@pytest.mark.parametrize("narrowed", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_who_narrows_the_draw_wants_one(narrowed):
    assert SamplingOptions(**narrowed).resolve() == Sampling(temperature=1.0, **narrowed)


def test_what_is_unused_is_not_shown():
    assert "top_k" not in SamplingOptions().resolve().to_json()
    assert SamplingOptions(top_k=3, stop=["a"]).resolve().to_json()["stop"] == ["a"]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"min_p": 1.1}, {"stop": [""]}, {"answers": 0}, {"tempreature": 1}]
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValidationError):
        SamplingOptions(**wrong)
