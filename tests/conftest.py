"""What all tests share: hypothesis without deadlines, as speed is shown in benchmarks and never asserted in a test.

CI tries the same examples each time, so that its verdict is about the change; everywhere else they are new ones.
"""

import os

from hypothesis import settings

settings.register_profile("finetune", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("finetune")
