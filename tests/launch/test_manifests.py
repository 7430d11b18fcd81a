"""The manifests' tests, now in tests/kubernetes, for scripts that name them by their path of before."""

from tests.kubernetes.test_manifests import *  # noqa: F403
