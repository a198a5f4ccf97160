/* The API, read from the server's own description of it. */

import { byId, make } from "./elements.js";

byId("example").textContent = `from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key="unused")
answer = client.images.generate(prompt="my chocolate brown dog on the beach", response_format="b64_json")
print(answer.data[0].revised_prompt)`;

const described = await (await fetch("/openapi.json")).json();
for (const [path, methods] of Object.entries(described.paths)) {
  for (const [method, route] of Object.entries(methods)) {
    const parts = [make("h2", `${method.toUpperCase()} ${path}`), make("p", route.summary ?? "")];
    const reference = route.requestBody?.content?.["application/json"]?.schema?.$ref;
    if (reference) parts.push(table(described.components.schemas[reference.split("/").pop()]));
    byId("routes").append(...parts);
  }
}

function table(schema) {
  const rows = Object.entries(schema.properties).map(([name, field]) => {
    const type = field.type ?? (field.anyOf ?? []).map((one) => one.type ?? one.const).filter((one) => one !== "null").join(" or ");
    const more = schema.required?.includes(name) ? "required" : `default ${JSON.stringify(field.default ?? null)}`;
    return make("tr", "", {}, make("td", name), make("td", type), make("td", more));
  });
  return make("table", "", {}, make("tbody", "", {}, ...rows));
}
