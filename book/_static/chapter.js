/* Show all code: opens and closes every fold of a chapter that holds code. */
document.addEventListener("DOMContentLoaded", () => {
  "use strict";
  const button = document.querySelector(".ch-code");
  if (!button) return;
  let open = false;
  button.hidden = false;
  button.addEventListener("click", () => {
    open = !open;
    for (const fold of document.querySelectorAll("main div.cell details.hide")) fold.open = open;
    button.textContent = open ? "Fold all code" : "Show all code";
  });
});
