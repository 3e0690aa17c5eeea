"""The T-fold network: the teachers' modules side by side, under the teachers' own paths.

`analysis` says what is known of a teacher's graphs, `network` builds the modules from it: `layers` (convolutions, grouped ones
too, and linear layers), `norms`, `layer_norm`. What flows between them is explained in `layers`, and gated by `streams`.
Where a forward begins, the top-level `gates` draws and hands out the gates and `weights` the weights, all at once.
`population` counts the candidates left and how many the student has, and `heads` are the last layers of teachers of different
label sets. `blueprint` keeps all that stays the same while the modules are trained.
"""
