/* The squares are one stop of the Tab key; arrows, Home and End move among them. */
"use strict";
for (const list of document.querySelectorAll(".vp-squares")) {
  const squares = [...list.querySelectorAll("a")];
  const stop = (square) => squares.forEach((each) => { each.tabIndex = each === square ? 0 : -1; });
  const perRow = () => squares.filter((each) => each.offsetTop === squares[0].offsetTop).length;
  stop(squares[0]);
  list.setAttribute("aria-label", `${list.getAttribute("aria-label")}; arrow keys move`);
  list.addEventListener("keydown", (event) => {
    const here = squares.indexOf(document.activeElement);
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: perRow(), ArrowUp: -perRow(),
      Home: -here, End: squares.length - 1 - here };
    if (here < 0 || !(event.key in steps)) return;
    event.preventDefault();
    const next = squares[Math.min(squares.length - 1, Math.max(0, here + steps[event.key]))];
    stop(next);
    next.focus();
  });
}
