"""The property tests find a divergence that a plugin registers by themselves, and tell a right one from a wrong one."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from places import CHECKOUT

FILES = [f"tests/tasks/losses/{name}.py" for name in ("test_divergences", "test_policy_gradient", "test_direct")]
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


def test_property_tests_judge_the_divergences_of_a_plugin() -> None:
    """In a process of its own that loads the plugin first, as a user would run them."""
    path = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests" / "plugins")])
    command = [sys.executable, "-m", "pytest", "-p", "extra_divergences", *FILES, "-k", "triangular or crooked"]
    result = subprocess.run(
        [*command, "-rA", "-q", "--tb=no", "-p", "no:cacheprovider"],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    told = re.findall(r"^(PASSED|FAILED) \S+::(\w+)\[(.*)\]", result.stdout, re.MULTILINE)
    found = {
        (kind, outcome): {test for said, test, name in told if kind in name and said == outcome}
        for kind in ("triangular", "crooked")
        for outcome in ("PASSED", "FAILED")
    }
    assert found["triangular", "PASSED"] >= OF_THE_ADVANTAGE | OF_THE_VALUE, result.stdout + result.stderr
    assert not found["triangular", "FAILED"], result.stdout
    assert found["crooked", "PASSED"] >= OF_THE_VALUE
    assert found["crooked", "FAILED"] == OF_THE_ADVANTAGE
