# Makes `examples` a package of this folder, so that `--reward examples.custom_reward:reward` finds no other one.
