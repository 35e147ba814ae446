"""Are the data and the models any good? Examinations, a judge model, blind human review, contamination."""
