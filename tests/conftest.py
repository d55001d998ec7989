"""What all tests share: hypothesis without deadlines, as speed is shown in benchmarks and never asserted in a test."""

from hypothesis import settings

settings.register_profile("finetune", deadline=None)
settings.load_profile("finetune")
