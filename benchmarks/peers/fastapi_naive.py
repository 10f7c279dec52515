"""FastAPI as its tutorial has it: a multipart file, a plain function in the thread pool, one image a call."""

import uvicorn
from fastapi import FastAPI, UploadFile
from model import read_arguments

MODEL, PORT = read_arguments()
app = FastAPI()


@app.post("/predict")
def predict(file: UploadFile) -> dict[str, list[float]]:
    return {"probabilities": MODEL.answer([MODEL.decode(file.file.read())])[0]}


uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning", access_log=False)
