"use strict";
// Everything that the model or the service says becomes text by textContent: none of it is read as HTML.
const byId = (id) => document.getElementById(id);
const maxBody = Number(document.body.dataset.maxBody);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const seconds = (number) => `${number.toFixed(2)} s`;
const MIB = 2 ** 20;
let clip = null; // the file that was asked about last
let running = null; // the request that is in the air

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function authorize(request) {
  const token = byId("token");
  if (token && token.value.trim()) request.setRequestHeader("Authorization", `Bearer ${token.value.trim()}`);
}

function show(text, { failed = false, busy = false, again = false } = {}) {
  const left = !busy && document.activeElement === byId("cancel") || !again && document.activeElement === byId("again");
  byId("state").textContent = text;
  byId("state").className = failed ? "error" : "";
  byId("cancel").hidden = byId("progress").hidden = !busy;
  byId("again").hidden = !again;
  if (left) byId(busy ? "cancel" : "drop").focus(); // a hidden button has lost the focus
}

function stop() {
  const request = running;
  running = null;
  if (request) request.abort();
}

async function ask(file) {
  stop();
  clip = file;
  byId("result").hidden = true;
  document.body.classList.remove("answered");
  if (file.size > maxBody) {
    return show(`${file.name} has ${(file.size / MIB).toFixed(1)} MiB; the service takes at most ${maxBody / MIB} MiB.`, { failed: true });
  }
  const readable = await file.slice(0, 1).arrayBuffer().then((start) => start.byteLength, () => -1);
  if (file !== clip) return undefined; // another one was chosen meanwhile
  if (readable < 1) return show(`${file.name} ${readable ? "cannot be read" : "is empty"}.`, { failed: true });
  return send(file);
}

function send(file) {
  const request = new XMLHttpRequest(); // fetch does not tell how much of a body is sent
  const mine = (act) => () => { if (running === request) act(); };
  running = request;
  request.open("POST", "v1/classify?frames=true");
  request.setRequestHeader("Content-Type", "application/octet-stream");
  authorize(request);
  byId("progress").removeAttribute("value");
  request.upload.onprogress = (event) => { if (running === request) byId("progress").value = event.loaded / file.size; };
  request.upload.onload = mine(() => {
    byId("progress").removeAttribute("value");
    show(`The model looks at ${file.name} …`, { busy: true });
  });
  request.onerror = mine(() => {
    running = null;
    show("No connection to the service. Is it still running?", { failed: true, again: true });
  });
  request.onload = mine(() => { running = null; finish(request, file); });
  show(`Sending ${file.name} …`, { busy: true });
  request.send(file);
}

function finish(request, file) {
  let body = null;
  try { body = JSON.parse(request.responseText); } catch { /* a proxy answers in HTML */ }
  if (request.status === 200 && body) {
    draw(body);
    byId("result").hidden = false;
    document.body.classList.add("answered");
    return show(`${file.name}: ${body.abstain ? "no decision" : body.choice}.`);
  }
  return show(`${file.name}: ${reason(request, body)}`, { failed: true, again: ![413, 415, 422].includes(request.status) });
}

function reason(request, body) {
  const said = body && body.error ? body.error.message : `the answer was HTTP status ${request.status}`;
  const wait = Number(request.getResponseHeader("Retry-After"));
  const hint = wait > 0 ? ` Try again in ${wait} s.` : "";
  return `${said}.${hint}`;
}

function draw(found) {
  byId("question").textContent = found.question;
  byId("model").textContent = `· ${found.model}`;
  drawDecision(found);
  drawStrip(found);
  drawProbabilities(found);
  byId("reasoning").hidden = !found.traces.length;
  byId("traces").replaceChildren(...found.traces.map((trace, number) => {
    const item = element("li");
    const answer = trace.answer === null ? "without an answer that can be read" : `answers ${trace.answer}`;
    item.append(element("p", `Text ${number + 1} of ${found.traces.length}, ${answer}, ${trace.n_tokens} tokens`, "soft"));
    item.append(element("pre", trace.text));
    return item;
  }));
  const { upload, decode, wait, model } = found.timing;
  byId("seconds").textContent = `${seconds(upload + decode + wait + model)}: upload ${seconds(upload)}, ` +
    `decoding ${seconds(decode)}, waiting ${seconds(wait)}, model ${seconds(model)}`;
}

function drawDecision(found) {
  byId("decision").className = found.abstain ? "abstains" : "";
  byId("verdict").textContent = found.abstain ? "No decision" : "Decision";
  const below = found.reason === "below_threshold";
  byId("choice").textContent = !found.abstain ? found.choice : below ? "Below the threshold" : "No answer";
  const share = found.choice === null ? "" : percent(found.probabilities[found.choice]);
  byId("why").textContent = !found.abstain ? share
    : below ? `Likeliest is ${found.choice} with ${share}; a decision needs ${percent(found.threshold)}.`
      : "None of the reasoning texts ended in an answer that can be read.";
}

function drawStrip(found) {
  const { frames, times, width, height, seconds: length, partial } = found.clip;
  byId("strip").replaceChildren(...found.frames.map((url, number) => {
    const item = element("li"), picture = element("img");
    const time = times === null ? "" : seconds(times[number]);
    picture.alt = `Frame ${number + 1} of ${frames}${time && ` at ${time}`}`;
    picture.src = url;
    item.append(picture, element("span", time));
    return item;
  }));
  const whole = typeof length === "number" && length > 0 ? ` of ${seconds(length)}` : "";
  byId("clip").textContent = `${frames} frames${whole}, ${width} × ${height} pixels` +
    (partial ? "; only a part of the clip could be decoded" : "");
}

function drawProbabilities(found) {
  const sorted = Object.entries(found.probabilities).sort((one, other) => other[1] - one[1]);
  byId("probs").replaceChildren(...sorted.map(([name, share]) => {
    const item = element("li", undefined, name === found.choice ? "chosen" : ""), track = element("span", undefined, "track");
    const bar = element("span", undefined, "bar");
    bar.style.width = `${100 * share}%`;
    track.setAttribute("aria-hidden", "true");
    track.append(bar);
    if (found.threshold !== null) {
      const mark = element("span", undefined, "mark");
      mark.style.left = `${100 * found.threshold}%`;
      track.append(mark);
    }
    item.append(element("span", name), track, element("span", percent(share), "share"));
    return item;
  }));
  const details = found.threshold_details;
  byId("threshold").textContent = found.threshold === null ? "No threshold: every answer counts as a decision."
    : `Threshold ${percent(found.threshold)}: of ${details.accepted} clips at or above it in calibration, ${details.wrong} were wrong ` +
      `(at most ${percent(details.bound)} at 95 % confidence; asked for ${percent(details.error)}).`;
  if (found.threshold !== null) byId("threshold").prepend(element("span", undefined, "key"));
  const { applied, temperature, fitted_on: data } = found.calibration;
  byId("calibration").textContent = `From ${found.probabilities_from}; ` +
    (applied ? `calibrated with temperature ${temperature.toPrecision(3)}, fitted on ${data}.` : "not calibrated.");
}

async function introduce() {
  const request = new XMLHttpRequest();
  request.open("GET", "v1/models");
  authorize(request);
  request.onload = () => {
    if (request.status !== 200) return show(reason(request, JSON.parse(request.responseText)), { failed: true });
    const { id, task } = JSON.parse(request.responseText).data[0];
    byId("model").textContent = `· ${id}`;
    byId("question").textContent = task.question;
    byId("classes").textContent = `One of: ${task.classes.join(", ")}`;
    return byId("state").className === "error" && !clip ? show("") : undefined;
  };
  request.send();
}

function take(files) {
  if (files.length === 1) ask(files[0]);
  else show(files.length ? "Several files: choose one clip." : "That was no file.", { failed: true });
}

byId("drop").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", (event) => {
  if (event.target.files.length) take([...event.target.files]);
  event.target.value = ""; // so that the same file can be chosen again
});
byId("cancel").addEventListener("click", () => { stop(); show("Cancelled.", { again: true }); });
byId("again").addEventListener("click", () => ask(clip));
// a drop beside the zone would open the clip in place of this page
addEventListener("dragover", (event) => { event.preventDefault(); byId("drop").classList.add("over"); });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) byId("drop").classList.remove("over"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  take([...event.dataTransfer.files]);
});
if (byId("access")) {
  byId("access").addEventListener("submit", (event) => {
    event.preventDefault();
    introduce();
    if (clip && !byId("again").hidden) ask(clip);
  });
} else {
  introduce();
}
