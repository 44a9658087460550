from hypothesis import settings

# The machine that runs the tests is shared: what is slow there is not wrong.
settings.register_profile("adapters", deadline=None)
settings.load_profile("adapters")
