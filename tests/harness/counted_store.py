"""A store in memory that counts what is asked of it."""

from collections import Counter

from torch.distributed import HashStore


class Counted:
    """A store in memory that counts messages, and the most keys of one."""

    def __init__(self):
        self.inner, self.calls, self.most = HashStore(), Counter(), 0

    def __getattr__(self, what):
        def ask(first, *args):
            self.calls[what] += 1
            self.most = max(self.most, len(first) if isinstance(first, list) else 1)
            return getattr(self.inner, what)(first, *args)

        return ask
