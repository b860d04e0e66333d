"""What engines and stages say to each other. Plain typed structs; knows neither sockets nor vLLM."""
