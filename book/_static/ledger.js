/* Filters of the ledger. The address keeps them (?verdict=false&whose=N5), and a claim's anchor wins. */
"use strict";
(() => {
  const form = document.querySelector(".claim-filters");
  if (!form) return;
  const rows = [...document.querySelectorAll(".claim-row")];
  const sections = [...new Set(rows.map((row) => row.closest("section")))];
  const selects = [...form.querySelectorAll("select")];
  const count = form.querySelector("[role=status]");

  const show = () => {
    const wanted = selects.map((select) => select.value).filter(Boolean);
    for (const row of rows) row.hidden = !wanted.every((name) => row.classList.contains(name));
    for (const section of sections) section.hidden = !section.querySelector(".claim-row:not([hidden])");
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} claims`;
  };
  const remember = () => {
    const query = new URLSearchParams();
    for (const { name, value } of selects) if (value) query.set(name, value.slice(2));
    try { // some browsers refuse it to pages opened as files
      history.replaceState(null, "", `${location.pathname}${query.size ? `?${query}` : ""}`);
    } catch { /* then the address stays */ }
  };
  const reveal = () => {
    const row = document.getElementById(location.hash.slice(1));
    if (!row || !row.classList.contains("claim-row")) return;
    if (row.hidden) { form.reset(); setTimeout(() => row.scrollIntoView()); }
    const more = row.querySelector("details");
    if (more) more.open = true;
  };
  const read = (query) => {
    for (const select of selects) {
      const value = query.get(select.name);
      const match = [...select.options].find((option) => option.value.slice(2) === (value || ""));
      select.value = match ? match.value : "";
    }
    show();
  };

  form.hidden = false;
  form.addEventListener("change", () => { show(); remember(); });
  form.addEventListener("reset", () => setTimeout(() => { show(); remember(); }));
  addEventListener("hashchange", reveal);
  for (const part of document.querySelectorAll(".vp-bar a")) part.addEventListener("click", (event) => {
    event.preventDefault();
    read(new URLSearchParams(part.search));
    remember();
    document.getElementById("all-claims").scrollIntoView();
  });
  read(new URLSearchParams(location.search));
  reveal();
})();
