"""From all teachers' channels to fewer: while the big student is trained, and in the end to one teacher's number.

Early: `closing` says which gates are closed for good, `shrinking` which groups the code allows to lose channels. It drops
them, and takes what one big student learned into the next. At the end `compression` finds for each tensor of the student where
it comes from, by a cut of `cuts`. `optimizer_state` takes momentum and moments along. For merges in parts of the depth `parts`
cuts it.
"""
