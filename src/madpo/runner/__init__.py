"""Operations, their results as folders with a record, and running graphs of them. Knows no machine learning."""
