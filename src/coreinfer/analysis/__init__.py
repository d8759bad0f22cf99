"""What core neurons are like: questions, each answered by numbers, figures and some text."""
