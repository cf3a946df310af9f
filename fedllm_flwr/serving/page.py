"""The page at ``/``: a form that talks to this server and to nothing else."""

SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fedllm</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
  label { display: block; margin-top: .8rem; font-weight: 600; }
  textarea, input { font: inherit; width: 100%; box-sizing: border-box; padding: .5rem; border: 1px solid #9aa5b1;
    border-radius: .3rem; }
  .row { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem; }
  button { font: inherit; margin-top: 1rem; padding: .5rem 1.2rem; }
  #answer { white-space: pre-wrap; min-height: 4rem; border-left: 3px solid #2f6f9f; padding-left: .8rem;
    margin-top: 1rem; }
  #status { color: #52606d; }
</style>
</head>
<body>
<h1 id="name">fedllm</h1>
<label for="message">Message</label>
<textarea id="message" rows="5" autofocus></textarea>
<div class="row">
  <div><label for="temperature">Temperature</label>
    <input id="temperature" type="number" value="0" min="0" max="2" step="0.1"></div>
  <div><label for="tokens">Longest answer, tokens</label><input id="tokens" type="number" value="64" min="1"></div>
  <div><label for="token">Token, if needed</label><input id="token" type="password" autocomplete="off"></div>
</div>
<button id="send" type="button">Send</button>
<div id="answer" role="region" aria-live="polite" aria-label="Answer"></div>
<p id="status"></p>
<script>
const at = id => document.getElementById(id);
const headers = () => {
  const own = {"Content-Type": "application/json"};
  if (at("token").value) own["Authorization"] = "Bearer " + at("token").value;
  return own;
};
let model = "";
async function findModel() {
  const response = await fetch("v1/models", {headers: headers()});
  if (!response.ok) throw new Error((await response.json()).error.message);
  model = (await response.json()).data[0].id;
  at("name").textContent = model;
}
async function send() {
  at("answer").textContent = "";
  at("status").textContent = "waiting";
  at("send").disabled = true;
  try {
    if (!model) await findModel();
    const response = await fetch("v1/chat/completions", {method: "POST", headers: headers(), body: JSON.stringify({
      model, messages: [{role: "user", content: at("message").value}], temperature: Number(at("temperature").value),
      max_tokens: Number(at("tokens").value), stream: true, stream_options: {include_usage: true}})});
    if (!response.ok) throw new Error((await response.json()).error.message);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const {done, value} = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const chunk = JSON.parse(line.slice(6));
        if (chunk.error) throw new Error(chunk.error.message);
        for (const choice of chunk.choices) at("answer").textContent += choice.delta.content || "";
        if (chunk.usage) at("status").textContent =
          chunk.usage.prompt_tokens + " tokens read, " + chunk.usage.completion_tokens + " written";
      }
    }
  } catch (error) {
    at("status").textContent = error.message;
  }
  at("send").disabled = false;
}
at("send").addEventListener("click", send);
findModel().catch(error => { at("status").textContent = error.message; });
</script>
</body>
</html>
"""
