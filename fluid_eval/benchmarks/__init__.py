"""What is asked and how it is judged: tasks, datasets, chat templates, profiles, HumanEval's samples."""
