"""What this machine has, in three levels: *present*, *usable*, *measured*.

One module for each kind of device, each a function over a `Machine` (files, links, commands and children with a
deadline), so that recordings of machines that are not here drive the same code. Present is what the operating system
shows; usable is a device on which a one-operator model really ran, in a child, with the fallback to the CPU forbidden;
measured is for a challenge to find out. `survey` does the first two; `present_devices` is the cheap look that a daemon
repeats.
"""
