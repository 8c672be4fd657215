"""The property tests find what a plugin registers by themselves, and tell what is right from what is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from places import CHECKOUT

OF_THE_ADVANTAGE = {
    "test_advantage_is_minus_f_plus_u_times_derivative",
    "test_opd_plus_is_the_gradient_of_the_divergence",
}
OF_THE_VALUE = {
    "test_is_its_f_divergence_and_a_divergence",
    "test_bucket_grows_with_the_support_to_the_full_divergence",
    "test_nothing_to_learn_from_an_equal_teacher",
    "test_hostile_inputs_have_finite_values_and_gradients",
}
OF_A_CREDIT = {
    "test_the_loss_is_the_expression_with_every_factor_held_constant",
    "test_hostile_values_have_finite_losses_and_gradients",
    "test_a_masked_token_has_no_effect_and_no_loss",
    "test_a_tokens_loss_does_not_depend_on_the_batch_that_it_is_in",
    "test_centring_subtracts_delta_where_the_models_agree",
    "test_what_a_config_admits_fits_float32",
    "test_an_advantage_depends_on_the_sampled_token",
    "test_what_a_credit_needs_and_misses_is_named",
}


def outcomes(plugin: str, kinds: tuple[str, ...], *files: str) -> dict[tuple[str, str], set[str]]:
    """(kind, outcome) -> names of tests, run in a process that loads the plugin first, as a user would run them."""
    path = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests" / "plugins")])
    paths = [f"tests/tasks/losses/{name}.py" for name in files]
    command = [sys.executable, "-m", "pytest", "-p", plugin, *paths, "-k", " or ".join(kinds)]
    result = subprocess.run(
        [*command, "-rA", "-q", "--tb=no", "-p", "no:cacheprovider"],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"^(PASSED|FAILED) \S+::(\w+)\[(.*)\]", result.stdout, re.MULTILINE)
    assert found, result.stdout + result.stderr
    return {
        (kind, outcome): {test for ended, test, name in found if kind in name and ended == outcome}
        for kind in kinds
        for outcome in ("PASSED", "FAILED")
    }


def test_property_tests_judge_the_divergences_of_a_plugin() -> None:
    kinds, files = ("triangular", "crooked"), ("test_divergences", "test_policy_gradient", "test_direct")
    found = outcomes("extra_divergences", kinds, *files)
    assert found["triangular", "PASSED"] >= OF_THE_ADVANTAGE | OF_THE_VALUE
    assert not found["triangular", "FAILED"]
    assert found["crooked", "PASSED"] >= OF_THE_VALUE
    assert found["crooked", "FAILED"] == OF_THE_ADVANTAGE


def test_property_tests_judge_the_credits_of_a_plugin() -> None:
    found = outcomes("extra_credits", ("decayed", "grouped", "whitened"), "test_credits")
    for right in ("decayed", "grouped"):
        assert found[right, "PASSED"] == OF_A_CREDIT and not found[right, "FAILED"]
    assert found["whitened", "FAILED"] == {"test_a_tokens_loss_does_not_depend_on_the_batch_that_it_is_in"}
