// Asks about one image: node infer.mjs cat.jpg [HOST:PORT]. Node 18 or later, no packages.
import { readFile } from "node:fs/promises";

const [file, server = "127.0.0.1:8000"] = process.argv.slice(2);
const image = await readFile(file);
const model = `http://${server}/v2/models/adaptive_vit`;
const { outputs = [] } = await (await fetch(model)).json();
const hasHead = outputs.some(({ name }) => name === "logits");
const length = Buffer.alloc(4);
length.writeUInt32LE(image.length);
const question = Buffer.from(JSON.stringify({
  inputs: [{
    name: "image_bytes", shape: [1, 1], datatype: "BYTES",
    parameters: { binary_data_size: 4 + image.length },
  }],
  outputs: [
    { name: "escalated" }, { name: "score" },
    hasHead ? { name: "logits", parameters: { classification: 3 } } : { name: "embedding" },
  ],
}));
const response = await fetch(`${model}/infer`, {
  method: "POST",
  headers: { "Inference-Header-Content-Length": String(question.length) },
  body: Buffer.concat([question, length, image]),
});
const answer = await response.json();
console.log(JSON.stringify(answer));
process.exitCode = response.ok ? 0 : 1;
