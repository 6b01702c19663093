// Shows the operations and the fields of /openapi.json.

const schema = await (await fetch("/openapi.json")).json();

function make(tag, text, name = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = name;
  return element;
}

const resolved = part => part?.$ref ? resolved(schema.components.schemas[part.$ref.split("/").at(-1)]) : part ?? {};

function kind(part) {
  part = part.$ref ? {...resolved(part)} : part;
  if (part.anyOf) return part.anyOf.map(kind).join(" or ");
  if (part.const !== undefined) return JSON.stringify(part.const);
  if (part.enum) return part.enum.map(value => JSON.stringify(value)).join(" or ");
  if (part.type === "array") return `list of ${kind(part.items)}`;
  if (part.contentMediaType) return "file";
  return part.title && part.type === "object" ? part.title : part.type;
}

function fields(body) {
  const list = make("dl", "", "fields");
  for (const [name, part] of Object.entries(body.properties ?? {})) {
    const term = make("dt", "");
    term.append(make("code", name));
    const standard = part.default === undefined || part.default === null ? "" : ` Default: ${part.default}.`;
    list.append(term, make("dd", `${kind(part)}. ${part.description ?? ""}${standard}`));
  }
  return list;
}

document.getElementById("example").textContent = `curl ${location.origin}/v1/embeddings/files -F files=@cat.jpg

from openai import OpenAI
client = OpenAI(base_url="${location.origin}/v1", api_key="TOKEN")
client.embeddings.create(model=client.models.list().data[0].id, input=["data:image/jpeg;base64,..."])`;

for (const [path, operations] of Object.entries(schema.paths)) {
  for (const [method, operation] of Object.entries(operations)) {
    const part = make("section", "", "operation"), title = make("h2", "");
    title.append(make("code", `${method.toUpperCase()} ${path}`));
    part.append(title, make("p", operation.description));
    const content = Object.values(operation.requestBody?.content ?? {})[0];
    if (content) part.append(fields(resolved(content.schema)));
    document.getElementById("operations").append(part);
  }
}
