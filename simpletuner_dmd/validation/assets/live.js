"use strict";
// Only in pages that `simpletuner report --serve` hands out: asks this machine for a newer page now and then.
(async () => {
  const EVERY = 2000;
  const page = location.pathname + "?fresh";
  let older = null; // the page as it was served, before its script changed it
  let tag = `"${document.querySelector("script[data-tag]").dataset.tag}"`;
  for (;;) {
    try {
      const answer = await fetch(page, { headers: { "If-None-Match": tag }, cache: "no-store" });
      if (answer.status === 200) {
        const newer = new DOMParser().parseFromString(await answer.text(), "text/html");
        refresh(newer, older);
        older = newer;
        tag = answer.headers.get("ETag") ?? "";
      }
      if (byId("live").dataset.lost) byId("live").textContent = "";
      delete byId("live").dataset.lost;
    } catch {
      byId("live").dataset.lost = "yes";
      byId("live").textContent = "No longer updated: the server has stopped.";
    }
    await new Promise(done => setTimeout(done, EVERY));
  }
})();
