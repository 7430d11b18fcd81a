"""A communication hook: sends only the signs of gradients, as signSGD does."""

from distopt.reduce.comm_hooks import CommHook


class Signs(CommHook):
    """Sums the signs of all ranks' gradients.

    References:
        Bernstein et al., signSGD: Compressed Optimisation for Non-Convex Problems, ICML 2018.
    """

    def start(self, bucket):
        bucket.flat.sign_()
        return self.backend.all_reduce(bucket.flat)

    def finish(self, bucket, started, summary):
        started.wait()
